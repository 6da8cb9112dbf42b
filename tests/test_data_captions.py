"""The captions of a folder: all formats, how they are merged, and invalid or hostile input."""

import csv
import json
import os
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from dalle.data import captions as captions_module
from dalle.data import open_source, split
from dalle.data.captions import MAX_CAPTION, FolderCaptions
from dalle.errors import UserError


def add(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (2, 2)).save(folder / name)


def captions_of(folder):
    source = open_source(str(folder), 8)
    return {source.key(i): source.captions_of(i) for i in range(len(source))}, dict(source.skipped)


def test_all_captions_of_an_image_are_merged_in_order_and_each_once(tmp_path):
    add(tmp_path, "a.png", "deep/a.png", "deep/er/b c.jpg")
    (tmp_path / "a.txt").write_text("from text\n\n  twice\ttold \n")
    (tmp_path / "captions.csv").write_text(
        "\ufefffile,extra,caption\r\n"
        'a.png,1,"from, csv"\r\n\r\ndeep/a.png,2,upper\r\na.png,3,twice told\r\n./deep/er/../a.png,4,"two\nlines"\r\n',
        encoding="utf-8",
    )
    (tmp_path / "deep/captions.csv").write_text("caption,file_name\nlower,a.png\né 日本,er/b c.jpg\n", encoding="utf-8")
    (tmp_path / "captions.jsonl").write_text(
        '{"file": "a.png", "caption": ["from json", "twice told"]}\n\n{"file_name": "deep/a.png", "caption": "json"}\n'
    )
    upward = '\ufeff{"file": "../../a.png", "caption": "up"}\n'
    (tmp_path / "deep/er/captions.jsonl").write_text(upward, encoding="utf-8")
    found, skipped = captions_of(tmp_path)
    assert skipped == {}
    assert found == {
        "a.png": ("from text", "twice told", "from, csv", "from json", "up"),
        "deep/a.png": ("upper", "two lines", "lower", "json"),
        "deep/er/b c.jpg": ("é 日本",),
    }
    source = open_source(str(tmp_path), 8)
    assert list(source.captions()) == [caption for captions in found.values() for caption in captions]
    assert source[0].captions == found["a.png"] and source[0].caption == source.caption(0) == "from text"


def test_paths_that_lead_out_of_the_folder_are_not_followed(tmp_path):
    root, outside = tmp_path / "images", tmp_path / "outside"
    add(tmp_path, "images/in.png", "images/sub/deep.png", "outside/out.png", "secret.png")
    (root / "link").symlink_to(outside, target_is_directory=True)
    paths = ["../secret.png", str(tmp_path / "secret.png"), str(root / "in.png"), "sub/../../secret.png"]
    paths += ["link/out.png", "..", ".", "sub", "nothing.png", "in.png\0", "IN.PNG", "sub\\deep.png", "a" * 100_000]
    lines = [{"file": path, "caption": "x"} for path in [*paths, "in.png"]]
    (root / "captions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    rows = ["../../images/in.png,x", "../in.png,fine", f"{root}/in.png,x"]
    (root / "sub/captions.csv").write_text("\n".join(["file,caption", *rows, ""]))
    found, skipped = captions_of(root)
    assert found == {"in.png": ("fine", "x")}
    places = {f"captions.jsonl:{n}" for n in range(1, len(paths) + 1)}
    assert set(skipped) == places | {"sub/captions.csv:2", "sub/captions.csv:4", "sub/deep.png"}
    assert all(reason.startswith("there is no image") and len(reason) < 200 for reason in map(skipped.get, places))


def test_bad_lines_of_a_jsonl_are_listed_by_number_and_the_others_used(tmp_path):
    add(tmp_path, "a.png")
    good = b'{"file": "a.png", "caption": "caption %d"}'
    bad = {
        b'{"file": "a.png", "caption": "x"': "",
        b"[1, 2]": "not a JSON object",
        b'"a.png"': "not a JSON object",
        b"nonsense": "",
        b"[" * 100_000: "",
        b"1" * 10_000: "",
        b'{"caption": "x"}': "names no file",
        b'{"file": 3, "caption": "x"}': "names no file",
        b'{"file": "", "caption": "x"}': "names no file",
        b'{"file": ["a.png"], "caption": "x"}': "names no file",
        b'{"file": "a.png"}': "no caption",
        b'{"file": "a.png", "caption": []}': "no caption",
        b'{"file": "a.png", "caption": null}': "no caption",
        b'{"file": "a.png", "caption": {"en": "x"}}': "no caption",
        b'{"file": "a.png", "caption": [4]}': "not a string",
        b'{"file": "a.png", "caption": " \\n "}': "empty",
        b'{"file": "a.png", "caption": "\\u0000"}': "NUL",
        b'{"file": "a.png", "caption": "\\ud800"}': "not UTF-8",
        b'{"file": "a.png", "caption": "caf\xe9"}': "not UTF-8",
        b'{"file": "a.png", "caption": "%s"}' % (b"x" * (MAX_CAPTION + 1)): "more than",
    }
    lines = [line for i, line in enumerate(bad) for line in (line, good % i)]
    (tmp_path / "captions.jsonl").write_bytes(b"\n".join(lines))
    found, skipped = captions_of(tmp_path)
    assert found == {"a.png": tuple(f"caption {i}" for i in range(len(bad)))}
    assert list(skipped) == [f"captions.jsonl:{2 * i + 1}" for i in range(len(bad))]
    for reason, expected in zip(skipped.values(), bad.values(), strict=True):
        assert expected in reason and "\n" not in reason and len(reason) < 300


def test_bad_rows_of_a_csv_are_listed_by_number_and_the_others_used(tmp_path):
    add(tmp_path, "a.png")
    rows = {
        b"a.png,one": None,
        b"a.png": "no caption",
        b"a.png,": "empty",
        b",x": "names no file",
        b"a.png,a dog, a cat": "quote captions",
        b"b.png,x": "no image 'b.png'",
        b"a.png,caf\xe9": "not UTF-8",
        b'a.png,"one"two': "",
        b"a.png,%s" % (b"x" * 200_000): "",
        b"a.png,%s" % (b"x" * (MAX_CAPTION + 1)): "more than",
        b'a.png,"with ""quotes"""': None,
        b'a.png,"never closed': "",
    }
    (tmp_path / "captions.csv").write_bytes(b"\n".join([b"file,caption", *rows]))
    found, skipped = captions_of(tmp_path)
    assert found == {"a.png": ("one", 'with "quotes"')}
    expected = {f"captions.csv:{n}": reason for n, reason in enumerate(rows.values(), 2) if reason is not None}
    assert list(skipped) == list(expected)
    for place, reason in expected.items():
        assert reason in skipped[place], place


def test_a_nul_in_a_csv_costs_its_row_alone(tmp_path):
    add(tmp_path, "a.png")
    (tmp_path / "captions.csv").write_bytes(b"file,caption\na.png,a\0b\na.png\0,c\na.png,good\n")
    found, skipped = captions_of(tmp_path)
    assert found == {"a.png": ("good",)} and list(skipped) == ["captions.csv:2", "captions.csv:3"]


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (b"", "nothing"),
        (b"path,caption\na.png,x\n", "'path', 'caption'"),
        (b"file,text\na.png,x\n", "'file', 'text'"),
        (b"file;caption\na.png;x\n", "'file;caption'"),
        ("file,caption\n".encode("utf-16"), "x00"),
        (b"a.png,an image\n", "'a.png', 'an image'"),
        (b"\x89PNG" + bytes(100), ""),
        (b"x" * 200_000, ""),
    ],
)
def test_a_csv_without_the_columns_is_rejected(tmp_path, content, found):
    add(tmp_path, "a.png")
    (tmp_path / "a.txt").write_text("good")
    (tmp_path / "captions.csv").write_bytes(content)
    with pytest.raises(UserError, match=r"captions\.csv.*file and caption") as caught:
        open_source(str(tmp_path), 8)
    assert found in str(caught.value) and "\n" not in str(caught.value) and len(str(caught.value)) < 600


def test_unreadable_tables_are_rejected(tmp_path, monkeypatch):
    add(tmp_path, "a.png")
    for name in ("captions.csv", "captions.jsonl"):
        os.mkfifo(tmp_path / name)
        with pytest.raises(UserError, match=f"{name}.*not a regular file"):
            open_source(str(tmp_path), 8)
        (tmp_path / name).unlink()
        (tmp_path / name).symlink_to(tmp_path / "nowhere")
        with pytest.raises(UserError, match=f"{name}.*No such file"):
            open_source(str(tmp_path), 8)
        (tmp_path / name).unlink()
    monkeypatch.setattr(captions_module, "MAX_TABLE_BYTES", 10)
    (tmp_path / "captions.jsonl").write_text('{"file": "a.png", "caption": "x"}')
    with pytest.raises(UserError, match="longer than 10 bytes"):
        open_source(str(tmp_path), 8)


def test_one_bad_line_of_a_text_costs_that_line(tmp_path):
    add(tmp_path, "a.png", "a.jpg")
    (tmp_path / "a.txt").write_text("first\nbad \0 byte\nlast\n")
    found, skipped = captions_of(tmp_path)
    assert found == {"a.jpg": ("first", "last"), "a.png": ("first", "last")}
    assert skipped == {"a.txt": "a NUL character in the caption"}


def test_names_that_are_not_utf8_are_skipped(tmp_path):
    add(tmp_path, "a.png")
    (tmp_path / "a.txt").write_text("good")
    os.link(tmp_path / "a.png", os.path.join(os.fsencode(tmp_path), b"caf\xe9.png"))
    found, skipped = captions_of(tmp_path)
    assert found == {"a.png": ("good",)} and skipped == {r"caf\xe9.png": "its name is not UTF-8"}


def test_captions_of_an_image_stay_on_one_side_of_the_split(tmp_path):
    names = [f"{i}.png" for i in range(60)]
    add(tmp_path, *names)
    with open(tmp_path / "captions.csv", "w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["file", "caption"])
        rows.writerows([name, f"{name} {n}"] for n in range(3) for name in names)
    source = open_source(str(tmp_path), 8)
    parts = [split(source, part) for part in ("train", "heldout")]
    assert sum(map(len, parts)) == 60 and len(parts[1]) > 0
    for part in parts:
        for i in range(len(part)):
            assert part.captions_of(i) == tuple(f"{part.key(i)} {n}" for n in range(3))


text = st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1).filter(str.strip)


@settings(max_examples=60)
@given(listed=st.lists(st.tuples(st.sampled_from(["a.png", "sub/ü, b.png"]), text), max_size=8))
def test_csv_and_jsonl_say_the_same(tmp_path_factory, listed):
    root = tmp_path_factory.mktemp("tables")
    images = ["a.png", "sub/ü, b.png"]
    with open(root / "captions.csv", "w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([("file", "caption"), *listed])
    (root / "captions.jsonl").write_text(
        "".join(json.dumps({"file": name, "caption": caption}, ensure_ascii=False) + "\n" for name, caption in listed),
        encoding="utf-8",
    )
    expected = {p: tuple(dict.fromkeys(" ".join(c.split()) for name, c in listed if name == p)) for p in images}
    for table in ("captions.csv", "captions.jsonl"):
        read = FolderCaptions(root, [table], images)
        assert {image: read.of(image) for image in images} == expected and read.skipped == []


def test_garbled_tables_raise_no_other_errors(tmp_path, seed):
    rng = random.Random(seed)
    intact = {
        "captions.csv": b'file,caption\na.png,one\n"a.png","two, ""three""\nlines"\n' * 3,
        "captions.jsonl": b'{"file": "a.png", "caption": ["one", "two"]}\n' * 4,
        "a.txt": "one\nzwölf\n".encode(),
    }
    for _ in range(300):
        for name, content in intact.items():
            data = bytearray(content[: rng.choice([len(content), rng.randrange(len(content))])])
            for _ in range(rng.randrange(6)):
                if data:
                    data[rng.randrange(len(data))] = rng.choice([rng.randrange(256), *b'"\n\r,\0{[\\'])
            (tmp_path / name).write_bytes(data)
        try:
            read = FolderCaptions(tmp_path, intact, ["a.png"])
        except UserError as error:
            assert "captions.csv" in str(error) and "\n" not in str(error)
        else:
            assert all(c == " ".join(c.split()) and c and "\0" not in c and c.encode() for c in read.of("a.png"))
            assert all(reason and "\n" not in reason for _, reason in read.skipped)

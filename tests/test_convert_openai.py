"""Conversion of OpenAI's dVAE: pickled modules of a package that need not be installed."""

import functools
import io
import pickle
import sys
import types
import zipfile
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from dalle import cli
from dalle.conversion.convert import convert
from dalle.conversion.openai_dvae import read_openai_dvae
from dalle.errors import UserError
from dalle.models import dvae as ours
from dalle.models.checkpoint import load_dvae, save_part

CONFIG = ours.DiscreteVAEConfig(16, 24, (8, 16, 32, 64), blocks=2, codebook_dim=12)


class Conv2d(nn.Module):
    """A convolution whose parameters are `w` and `b`."""

    def __init__(self, n_in, n_out, kernel):
        super().__init__()
        self.n_in, self.n_out, self.kw, self.use_float16, self.device = n_in, n_out, kernel, True, torch.device("cpu")
        self.w = nn.Parameter(torch.randn(n_out, n_in, kernel, kernel) / (n_in * kernel**2) ** 0.5)
        self.b = nn.Parameter(torch.randn(n_out) / 10)

    def forward(self, x):
        return F.conv2d(x, self.w, self.b, padding=self.kw // 2)


class Block(nn.Module):
    def __init__(self, n_in, n_out, kernels, n_layers):
        super().__init__()
        self.post_gain, hidden = 1 / n_layers**2, n_out // 4
        self.id_path = Conv2d(n_in, n_out, 1) if n_in != n_out else nn.Identity()
        sizes = [n_in, hidden, hidden, hidden, n_out]
        layers = OrderedDict()
        for i, kernel in enumerate(kernels, 1):
            layers[f"relu_{i}"] = nn.ReLU()
            layers[f"conv_{i}"] = Conv2d(sizes[i - 1], sizes[i], kernel)
        self.res_path = nn.Sequential(layers)

    def forward(self, x):
        return self.id_path(x) + self.post_gain * self.res_path(x)


class EncoderBlock(Block):
    kernels = (3, 3, 3, 1)


class DecoderBlock(Block):
    kernels = (1, 3, 3, 3)


class Network(nn.Module):
    def __init__(self, block, first, widths, last, between):
        super().__init__()
        self.device, self.group_count = torch.device("cpu"), len(widths)
        layers, n = OrderedDict(input=first), first.n_out
        for g, width in enumerate(widths, 1):
            group = OrderedDict()
            for b in (1, 2):
                group[f"block_{b}"] = block(n, width, block.kernels, 2 * len(widths))
                n = width
            if g < len(widths):
                group["scale"] = between()
            layers[f"group_{g}"] = nn.Sequential(group)
        layers["output"] = nn.Sequential(OrderedDict(relu=nn.ReLU(), conv=last))
        self.blocks = nn.Sequential(layers)

    def forward(self, x):
        return self.blocks(x)


class Encoder(Network):
    def __init__(self):
        super().__init__(EncoderBlock, Conv2d(3, 8, 7), (8, 16, 32, 64), Conv2d(64, 24, 1), lambda: nn.MaxPool2d(2))


class Decoder(Network):
    def __init__(self):
        between = functools.partial(nn.Upsample, scale_factor=2, mode="nearest")
        super().__init__(DecoderBlock, Conv2d(24, 12, 1), (64, 32, 16, 8), Conv2d(8, 6, 1), between)


PACKAGE = {Encoder: "dall_e.encoder", EncoderBlock: "dall_e.encoder", Decoder: "dall_e.decoder"} | {
    DecoderBlock: "dall_e.decoder", Conv2d: "dall_e.utils",
}  # fmt: skip


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setitem(ours.PRESETS, "dalle", CONFIG)


@pytest.fixture
def save(monkeypatch):
    """`torch.save` under the names of the real package, which is gone afterwards."""

    def save(module, path, zipped=True):
        with monkeypatch.context() as context:
            for name in ("dall_e", *PACKAGE.values()):
                context.setitem(sys.modules, name, types.ModuleType(name))
            for cls, name in PACKAGE.items():
                context.setattr(cls, "__module__", name)
                setattr(sys.modules[name], cls.__name__, cls)
            source = ["class Encoder:"], 0, "encoder.py"  # the old format holds the source of every class
            context.setattr(torch.serialization, "get_source_lines_and_file", lambda cls: source)
            torch.save(module, path, _use_new_zipfile_serialization=zipped)
        assert "dall_e.utils" not in sys.modules

    return save


@pytest.fixture
def models():
    torch.manual_seed(3)
    return Encoder(), Decoder()


@pytest.fixture(params=[True, False], ids=["zip", "legacy"])
def files(request, tmp_path, save, models):
    for module, name in zip(models, ("encoder", "decoder"), strict=True):
        save(module, tmp_path / f"{name}.pkl", request.param)
    return tmp_path


def test_the_converted_model_is_theirs(files, tmp_path, models):
    encoder, decoder = (module.double() for module in models)
    convert("openai-dvae", files, tmp_path / "out")
    dvae = load_dvae(tmp_path / "out").double()
    pixels = torch.rand(2, 3, 32, 16, dtype=torch.float64)
    logits = encoder(0.8 * pixels + 0.1)
    torch.testing.assert_close(dvae.encoder(0.8 * pixels + 0.1), logits, rtol=1e-12, atol=1e-12)
    codes = logits.argmax(1)
    stats = decoder(F.one_hot(codes, 24).permute(0, 3, 1, 2).double())
    torch.testing.assert_close(dvae.decoder.from_codes(codes), stats, rtol=1e-12, atol=1e-12)
    expected = ((stats[:, :3].sigmoid() - 0.1) / 0.8).clamp(0, 1).float()
    torch.testing.assert_close(dvae.decode(codes), expected, rtol=1e-5, atol=1e-6)


def test_published_tensors(monkeypatch):
    """The names and sizes of the published files, 74 and 76 tensors."""
    monkeypatch.undo()
    from dalle.conversion.openai_dvae import _their_name

    with torch.device("meta"):
        model = ours.DiscreteVAE(ours.DiscreteVAEConfig.preset("dalle"))
    encoder, decoder = ({_their_name(k): list(v.shape) for k, v in part.state_dict().items()}
                        for part in (model.encoder, model.decoder))  # fmt: skip
    assert len(encoder) == 74 and len(decoder) == 76
    assert encoder["blocks.input.w"] == [256, 3, 7, 7] and encoder["blocks.output.conv.b"] == [8192]
    assert encoder["blocks.group_2.block_1.id_path.w"] == [512, 256, 1, 1]
    assert decoder["blocks.group_1.block_1.res_path.conv_4.w"] == [2048, 512, 3, 3]
    assert decoder["blocks.output.conv.w"] == [6, 256, 1, 1] and decoder["blocks.input.b"] == [128]


def test_command(files, tmp_path, capsys):
    out, image = tmp_path / "out", tmp_path / "image.png"
    assert cli.main(["convert", "openai-dvae", str(files), "--out", str(out)]) == 0
    Image.new("RGB", (40, 20), "red").save(image)
    assert cli.main(["reconstruct", str(image), "--model", str(out), "--out", str(tmp_path / "grid.png")]) == 0
    assert "codes used" in capsys.readouterr().out
    assert cli.main(["convert", "openai-dvae", str(files), "--out", str(out)]) == 0  # the same again
    save_part(out, "dvae", ours.DiscreteVAE(CONFIG))
    assert cli.main(["convert", "openai-dvae", str(files), "--out", str(out)]) == 2
    assert "holds another dVAE, which would be replaced" in capsys.readouterr().err


def refusal(directory):
    with pytest.raises(UserError) as error:
        read_openai_dvae(directory)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_first_tensor_that_differs_is_named(files, models, save):
    models[1].blocks.group_2.block_1.id_path.w = nn.Parameter(torch.zeros(16, 64, 1, 1))
    save(models[1], files / "decoder.pkl")
    assert "decoder.pkl belongs to another configuration: blocks.group_2.block_1.id_path.w is [16, 64, 1, 1] there "\
           "and [32, 64, 1, 1] here" in refusal(files)  # fmt: skip
    (files / "decoder.pkl").write_bytes((files / "encoder.pkl").read_bytes())
    assert "blocks.group_1.block_1.id_path.b is absent there and [64] here" in refusal(files)


def test_not_finite(files, models, save):
    models[0].blocks.input.w.data[0, 0, 0, 0] = torch.nan
    save(models[0], files / "encoder.pkl")
    assert "input.weight holds values that are not finite" in refusal(files)


@pytest.mark.parametrize("share", [0, 1, 40, 90, 99.9])
def test_truncated(files, share):
    content = (files / "encoder.pkl").read_bytes()
    (files / "encoder.pkl").write_bytes(content[: int(len(content) * share / 100)])
    assert "encoder.pkl cannot be read as weights" in refusal(files)


def test_missing(tmp_path):
    assert refusal(tmp_path) == f"{tmp_path}/encoder.pkl does not exist"


class Calls:
    """Pickles as a call of a function."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("zipped", [True, False])
def test_code_is_not_run(tmp_path, zipped):
    proof = tmp_path / "proof"
    for hostile in (Calls(Path.touch, proof), Calls(exec, f"open({str(proof)!r}, 'w')"), {"a": Calls(eval, "1")}):
        torch.save(hostile, tmp_path / "encoder.pkl", _use_new_zipfile_serialization=zipped)
        assert "which weights do not need" in refusal(tmp_path)
    assert not proof.exists()


def hostile_zip(path, pickled, **options):
    with zipfile.ZipFile(path, "w", **options) as archive:
        for name, content in {"data.pkl": pickled, "version": b"3\n", "byteorder": b"little"}.items():
            archive.writestr(f"archive/{name}", content)


def test_pickles_that_ask_for_much(tmp_path):
    """A memo index of 2^32, for which the unpickler in C fills 64 GB; a module that occurs twice; a compressed file."""
    path = tmp_path / "encoder.pkl"
    hostile_zip(path, b"\x80\x02Nr\xff\xff\xff\xff.")
    assert "cannot be read as weights" in refusal(tmp_path)
    module = b"cdall_e.encoder\nEncoder\n)\x81}(X\x0b\x00\x00\x00_parametersccollections\nOrderedDict\n)R"
    child = module + b"X\x08\x00\x00\x00_modulesccollections\nOrderedDict\n)Rub"
    twice = b"}(X\x01\x00\x00\x00a" + child + b"q\x01X\x01\x00\x00\x00bh\x01u"
    hostile_zip(path, b"\x80\x02" + module + b"X\x08\x00\x00\x00_modules" + twice + b"ub.")
    assert "the module b. occurs twice" in refusal(tmp_path)
    hostile_zip(path, b"\x80\x02N.", compression=zipfile.ZIP_DEFLATED)
    assert "it is compressed" in refusal(tmp_path)


def test_torchscript_is_refused(tmp_path):
    torch.jit.script(nn.Linear(2, 2)).save(str(tmp_path / "encoder.pkl"))
    assert "it is a TorchScript archive" in refusal(tmp_path)


def test_other_kinds_of_pickles(tmp_path):
    for value in (3, None, [], {"state_dict": 1}, OrderedDict(a=torch.zeros(2))):
        torch.save(value, tmp_path / "encoder.pkl")
        assert "cannot be read as weights" in refusal(tmp_path)
    (tmp_path / "encoder.pkl").write_bytes(pickle.dumps(io.BytesIO(b"x")))
    assert "cannot be read as weights" in refusal(tmp_path)

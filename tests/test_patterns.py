"""Patterns against independent scalar definitions, and against counts from other sources."""

import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import dalle_kernels as dk
from dalle_kernels import patterns
from patterns_for_tests import NAMES, every_pattern

P = dk.AttentionPattern

# Scalar rules on image coordinates: query (qr, qc), key (kr, kc), d the raster distance, r the kernel's radius.
SCALAR = {
    "row": lambda qr, qc, kr, kc, d, H, W: d <= W,
    "column": lambda qr, qc, kr, kc, d, H, W: qc == kc,
    "conv-wrap": lambda qr, qc, kr, kc, d, H, W: d // W <= 1 and min(d % W, W - d % W) <= 1,
    "conv-clip": lambda qr, qc, kr, kc, d, H, W: abs(qr - kr) <= 2 and abs(qc - kc) <= 2,
    "conv-torus": lambda qr, qc, kr, kc, d, H, W: min((qr - kr) % H, (kr - qr) % H) <= 1 and min((qc - kc) % W, (kc - qc) % W) <= 1,
    "axial_row": lambda qr, qc, kr, kc, d, H, W: qr == kr,
    "corner_conv": lambda qr, qc, kr, kc, d, H, W: (qr - kr) in (0, 2, 4) and (qc - kc) in (0, 2, 4),
    "causal": lambda qr, qc, kr, kc, d, H, W: True,
}  # fmt: skip


def scalar_mask(name, text_len, grid):
    H, W = grid
    n = text_len + H * W
    mask = torch.zeros(n, n, dtype=torch.bool)
    for q in range(n):
        for k in range(q + 1):
            if k < text_len:
                mask[q, k] = True
            else:
                i, j = q - text_len, k - text_len
                mask[q, k] = SCALAR[name](*divmod(i, W), *divmod(j, W), i - j, H, W)
    return mask


@pytest.mark.parametrize("name", [name for name in NAMES if name != "mask"])
@settings(max_examples=25)
@given(text_len=st.integers(0, 9), height=st.integers(1, 7), width=st.integers(1, 7))
def test_patterns_equal_their_scalar_definitions(name, text_len, height, width):
    pattern = every_pattern(text_len, (height, width))[name]
    assert torch.equal(pattern.dense(), scalar_mask(name, text_len, (height, width)))


def test_what_is_common_to_every_rule_is_added(monkeypatch):
    """Causality, all text, and that a token sees itself."""
    monkeypatch.setitem(patterns._RULES, "opposite", lambda q, k, H, W: (q + k) % 2 == 1)
    mask = P._make("opposite", 2, (2, 3)).dense()
    expected = (torch.arange(8)[:, None] + torch.arange(8)) % 2 == 1
    expected[:, :2] = True
    assert torch.equal(mask, (expected | torch.eye(8, dtype=torch.bool)).tril())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("diagonals", 2, (2, 3)), "there is no pattern 'diagonals'"),
        (("row", 2, (2, 3), "rows"), "layout='rows' is not"),
    ],
)
def test_unknown_names_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        P._make(*arguments)


@pytest.mark.parametrize(
    ("pattern", "pairs"),
    [
        (P.causal(256, (32, 32)), 819_840),
        (P.row(256, (32, 32)), 328_304),
        (P.column(256, (32, 32)), 311_936),
        (P.conv(256, (32, 32)), 356_384),
    ],
    ids=str,
)
def test_pair_counts_at_the_papers_size(pattern, pairs):
    assert pattern.nnz == pairs


# Image keys of some image queries for 6 text tokens and a 4 x 4 grid, from the paper's Figure 11 and the peers' masks.
SEEN = {
    "row": (P.row(6, (4, 4)), {4: [0, 1, 2, 3, 4], 7: [3, 4, 5, 6, 7], 9: [5, 6, 7, 8, 9], 12: [8, 9, 10, 11, 12]}),
    "column": (P.column(6, (4, 4)), {4: [0, 4], 7: [3, 7], 9: [1, 5, 9], 12: [0, 4, 8, 12]}),
    "conv-wrap": (P.conv(6, (4, 4), kernel=3), {4: [0, 1, 3, 4], 7: [0, 2, 3, 4, 6, 7], 9: [2, 4, 5, 6, 8, 9], 12: [5, 7, 8, 9, 11, 12]}),
    "conv-clip": (P.conv(6, (4, 4), kernel=3, edge="clip"), {4: [0, 1, 4], 7: [2, 3, 6, 7], 9: [4, 5, 6, 8, 9], 12: [8, 9, 12]}),
    "conv-torus": (P.conv(6, (4, 4), kernel=3, edge="torus"), {4: [0, 1, 3, 4], 7: [0, 2, 3, 4, 6, 7], 9: [4, 5, 6, 8, 9], 12: [0, 1, 3, 8, 9, 11, 12]}),
    "axial_row": (P.axial_row(6, (4, 4)), {4: [4], 7: [4, 5, 6, 7], 9: [8, 9], 12: [12]}),
    "corner_conv": (P.corner_conv(6, (4, 4), kernel=3), {4: [0, 4], 7: [1, 2, 3, 5, 6, 7], 9: [0, 1, 4, 5, 8, 9], 12: [4, 8, 12]}),
}  # fmt: skip


@pytest.mark.parametrize("name", SEEN)
def test_keys_seen_in_the_papers_figure(name):
    pattern, seen = SEEN[name]
    for query, keys in seen.items():
        row = pattern.dense(6 + query, 7 + query)[0]
        assert row[:6].all()
        assert row[6:].nonzero().flatten().tolist() == keys


@pytest.mark.parametrize("name", NAMES)
def test_rows_nnz_order_and_mask_mod_agree_with_dense(name, seed):
    pattern = every_pattern(5, (3, 7))[name]
    dense = pattern.dense()
    assert dense.shape == (26, 26) and dense.diagonal().all() and not dense.triu(1).any()
    assert torch.equal(pattern.dense(4, 19), dense[4:19])
    assert pattern.nnz == int(dense.sum())
    assert sorted(pattern.order().tolist()) == sorted(pattern.decode_order().tolist()) == list(range(26))
    q, k = torch.arange(26)[:, None], torch.arange(26)[None]
    assert torch.equal(pattern.mask_mod(0, 0, q, k), dense)


@settings(max_examples=25)
@given(n=st.integers(1, 200), window=st.integers(0, 70), parts=st.integers(1, 4), data=st.data())
def test_a_mask_mod_is_its_mask(n, window, parts, data):
    document = torch.tensor(sorted(data.draw(st.lists(st.integers(1, parts), min_size=n, max_size=n))))
    text_len = data.draw(st.integers(0, n - 1))

    def mask_mod(b, h, q, k):
        return (k <= q) & (q - k <= window) & (document[q] == document[k])

    token = torch.arange(n)
    mask = mask_mod(0, 0, token[:, None], token)
    pattern = P.from_mask_mod(mask_mod, n, text_len=text_len)
    assert torch.equal(pattern.dense(), mask) and pattern == P.from_mask(mask, text_len=text_len)
    assert pattern == P.from_mask_mod(pattern.mask_mod, n, text_len=text_len)


def test_a_mask_mod_is_never_a_whole_matrix():
    shapes = set()

    def causal(b, h, q, k):
        shapes.add(((q <= k).numel(), b.ndim, h.ndim))
        return k <= q

    pattern = P.from_mask_mod(causal, 4000)
    assert max(shapes) == (64 * 4000, 0, 0) and pattern.nnz == 4000 * 4001 // 2


def test_a_mask_pickles_compressed(seed):
    pattern = P.from_mask(P.conv(256, (32, 32)).dense(), text_len=256, order=torch.randperm(1280))
    pickled = pickle.dumps(pattern)
    assert len(pickled) < 40_000 and pickle.loads(pickled) == pattern
    assert torch.equal(pickle.loads(pickled).dense(), pattern.dense())


def test_equal_patterns_are_equal_and_hash_alike():
    mask = torch.ones(5, 5, dtype=torch.bool).tril()
    assert P.row(4, (2, 3)) == P.row(4, [2, 3]) and P.row(4, (2, 3)) != P.row(4, (3, 2))
    assert P.conv(4, (2, 3)) != P.conv(4, (2, 3), edge="clip")
    assert P.from_mask(mask) == P.from_mask(mask.clone()) and hash(P.from_mask(mask)) == hash(P.from_mask(mask.clone()))
    assert P.from_mask(mask) != P.from_mask(torch.eye(5, dtype=torch.bool))
    kept = P.from_mask(mask)
    mask[4, 0] = False
    assert kept.dense()[4, 0], "a pattern keeps its own copy of the mask"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: P.row(-1, (4, 4)), "text_len=-1"),
        (lambda: P.row(4, (0, 4)), r"grid=\(0, 4\)"),
        (lambda: P.row(4, 16), "grid must be a pair"),
        (lambda: P.row(4, (4.5, 4)), "grid must be a pair"),
        (lambda: P.conv(4, (4, 4), kernel=4), "kernel must be odd and at least 1; got 4"),
        (lambda: P.conv(4, (4, 4), edge="zero"), "edge='zero'"),
        (lambda: P.corner_conv(4, (4, 4), dilation=0), "dilation must be at least 1; got 0"),
        (lambda: P.from_mask(torch.ones(3, 3, dtype=torch.bool)), r"3 pairs .* query 0 and key 1; .*mask\.tril\(\)"),
        (lambda: P.from_mask(torch.zeros(3, 3, dtype=torch.bool)), "excludes token 0 from its own keys"),
        (lambda: P.from_mask(torch.eye(3)), "bool matrix"),
        (lambda: P.from_mask_mod(lambda b, h, q, k: k >= q, 100), r"4,950 pairs .* query 0 and key 1; return mask_mod\("),
        (lambda: P.from_mask_mod(lambda b, h, q, k: k < q, 100), "mask_mod excludes token 0 from its own keys"),
        (lambda: P.from_mask_mod(lambda b, h, q, k: (k <= q).float(), 9), "a bool tensor; got torch.float32"),
        (lambda: P.from_mask_mod(lambda b, h, q, k: True, 9), "must return a bool tensor; got bool"),
        (lambda: P.from_mask_mod(lambda b, h, q, k: k <= q, 0), "seq_len must be at least 1; got 0"),
        (lambda: P.from_mask(torch.zeros(0, 0, dtype=torch.bool)), r"N at least 1; got torch.bool \[0, 0\]"),
        (lambda: P.from_mask(torch.eye(3, dtype=torch.bool), order=[0, 0, 1]), "permutation of the 3 tokens"),
        (lambda: P.from_mask(torch.eye(3, dtype=torch.bool), text_len=3), r"text_len must lie in \[0, 2\]"),
        (lambda: P("row", 2, (2, 3), layout="x"), "layout='x' is not one of"),
    ],
)
def test_bad_patterns_are_refused_with_the_value(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    "make",
    [
        lambda: P.row(2.5, (3, 3)),
        lambda: P.conv(4, (4, 4), kernel=3.5),
        lambda: P.from_mask(torch.eye(3, dtype=torch.bool), text_len=1.5),
        lambda: P("row", 1.5, (2, 2)),
        lambda: P("row", 1, (2.5, 2)),
    ],
)
def test_sizes_must_be_whole_numbers(make):
    with pytest.raises(TypeError, match="must be a whole number; got"):
        make()


@pytest.mark.parametrize("name", NAMES)
def test_pairs_and_sparsity_are_those_of_the_mask(name, seed):
    pattern = every_pattern(5, (6, 11))[name]
    pairs = int(pattern.dense().sum())
    assert pattern.nnz == pairs and pattern.sparsity() == 1 - pairs / pattern.seq_len**2


def test_a_pattern_prints_its_mask():
    assert str(P.conv(1, (2, 2), kernel=1)).splitlines() == [
        "conv-wrap: 1 text + 2 x 2 image tokens",
        "█    ",
        "██   ",
        "█ █  ",
        "█  █ ",
        "█   █",
        "9 of 25 pairs (36.0 %); 1 tiles of 64 x 64: 0 full, 1 partial, 0 empty",
    ]


def test_a_large_pattern_prints_blocks_of_its_mask():
    pattern = P.causal(64, (8, 16))
    first, *picture, last = str(pattern).splitlines()
    assert len(picture) == 32 and {len(line) for line in picture} == {32}
    for i, line in enumerate(picture):
        assert line[:i] == "█" * i and line[i] in "▒▓" and not line[i + 1 :].strip()
    assert first == "causal: 64 text + 8 x 16 image tokens"
    assert last == "18,528 of 36,864 pairs (50.3 %); 9 tiles of 64 x 64: 3 full, 3 partial, 3 empty"

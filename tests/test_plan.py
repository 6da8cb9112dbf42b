"""A plan decoded by plain Python must give back exactly the pattern it was compiled from."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import dalle_kernels as dk
from dalle_kernels.plan import HEADER, TileShape, compile_plan, plan_tensor
from patterns_for_tests import NAMES, every_pattern

P = dk.AttentionPattern


def decode(packed):
    """The bool matrix [rows' tokens, columns' tokens] that a packed plan describes, read from its header by the
    documented format.
    """
    n, tile_rows, columns, tiles = packed[2:6]
    at_rows, at_begin, at_entries, at_gathered, at_masks, total = packed[9:15]
    assert total == len(packed) and at_rows == HEADER
    mask = np.zeros((n, n), bool)
    for tile in range(tiles):
        tokens = packed[at_rows + tile * tile_rows :][:tile_rows]
        for entry in range(packed[at_begin + tile], packed[at_begin + tile + 1]):
            keys, groups, mask_index = packed[at_entries + 3 * entry :][:3]
            for g in range(groups):
                if keys >= 0:
                    group = keys + g * columns + np.arange(columns)
                else:
                    group = packed[at_gathered + (~keys + g) * columns :][:columns]
                for j, key in enumerate(group):
                    for r, token in enumerate(tokens):
                        allowed = True
                        if mask_index >= 0:
                            word = packed[at_masks + ((mask_index + g) * columns + j) * (tile_rows // 32) + r // 32]
                            allowed = bool(int(word) >> (r % 32) & 1)
                        if key < 0 or token < 0:
                            assert key >= 0 or not allowed, "a padding slot must be masked"
                        elif allowed:
                            assert not mask[token, key], "a pair is listed twice"
                            mask[token, key] = True
    return mask


@settings(deadline=None, max_examples=15)
@given(
    text_len=st.integers(0, 40),
    height=st.integers(1, 7),
    width=st.integers(1, 9),
    name=st.sampled_from(NAMES),
    rows=st.sampled_from([32, 64]),
    columns=st.sampled_from([1, 8, 64]),
    side=st.sampled_from(["query", "key"]),
    data=st.data(),
)
def test_decoded_plan_is_the_pattern(text_len, height, width, name, rows, columns, side, data):
    pattern = every_pattern(text_len, (height, width))[name]
    n = data.draw(st.integers(1, pattern.seq_len))
    plan = compile_plan(pattern, n, TileShape(rows, columns), side)
    expected = pattern.dense()[:n, :n].numpy()
    assert np.array_equal(decode(plan.packed), expected if side == "query" else expected.T)


def test_the_order_packs_columns():
    """In column order a tile needs the text and its own column; in raster order it would need every column."""
    pattern = P.column(256, (32, 32))
    raster = P.from_mask(pattern.dense(), text_len=256)
    assert compile_plan(pattern, 1280).pairs < 1.1 * pattern.nnz
    assert compile_plan(raster, 1280).pairs > 2 * pattern.nnz


def test_large_grids_stream():
    """256 text tokens and a 128 x 128 grid: an N x N matrix would take 277 MB, the plan takes under 10."""
    plan = compile_plan(P.row(256, (128, 128)), 256 + 128 * 128)
    assert plan.packed.nbytes < 10e6
    assert plan.pairs < 1.2 * P.row(256, (128, 128)).nnz


def test_plans_are_cached_by_value():
    device = torch.device("cpu")
    assert plan_tensor(P.row(3, (2, 2)), 7, device) is plan_tensor(P.row(3, [2, 2]), 7, device)
    assert P.row(3, (2, 2)).prepare("cpu") == P.row(3, (2, 2))


@pytest.mark.parametrize("side", ["query", "key"])
def test_equal_masks_are_stored_once(side):
    plan = compile_plan(P.row(64, (32, 32)), 64 + 1024, side=side)
    assert len(plan.masks) < len(plan.gathered) / 4

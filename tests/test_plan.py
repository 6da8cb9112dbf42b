"""A plan decoded in plain Python must equal the pattern from which it was compiled."""

import heapq
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import dalle_kernels as dk
from dalle_kernels.backends.native.tiles import TILES
from dalle_kernels.backends.plans import plan_tensor
from dalle_kernels.decode_schedule import ScheduleHeader, compile_schedule
from dalle_kernels.plan import HEADER_WORDS, PlanHeader, TileShape, compile_plan
from patterns_for_tests import NAMES, every_pattern

P = dk.AttentionPattern


def decode(packed):
    """The bool matrix [rows' tokens, columns' tokens] that a packed plan describes, read from its header by the
    documented format.
    """
    n, tile_rows, columns, tiles = packed[2:6]
    at_rows, at_begin, at_entries, at_gathered, at_masks, _, _, total = packed[13:21]
    assert total == len(packed) and at_rows == HEADER_WORDS and not (packed[13:21] % 4).any()
    mask = np.zeros((n, n), bool)
    for tile in range(tiles):
        tokens = packed[at_rows + tile * tile_rows :][:tile_rows]
        for entry in range(packed[at_begin + tile], packed[at_begin + tile + 1]):
            keys, groups, mask_index, live = packed[at_entries + 4 * entry :][:4]
            seen = set()
            for g in range(groups):
                if keys >= 0:
                    group = keys + g * columns + np.arange(columns)
                else:
                    group = packed[at_gathered + (~keys + g) * columns :][:columns]
                for j, key in enumerate(group):
                    for r, token in enumerate(tokens):
                        allowed = True
                        if mask_index >= 0:
                            word = packed[at_masks + ((mask_index + g) * (tile_rows // 32) + r // 32) * columns + j]
                            allowed = bool(int(word) >> (r % 32) & 1)
                        if key < 0 or token < 0:
                            assert key >= 0 or not allowed, "a padding slot must be masked"
                        elif allowed:
                            assert not mask[token, key], "a pair is listed twice"
                            mask[token, key] = True
                            seen.add(r // 16 * -(-columns // 16) + j // 16)
            assert int(live) & 0xFFFFFFFF == sum(1 << bit for bit in seen)
    return mask


@settings(max_examples=15)
@given(
    text_len=st.integers(0, 40),
    height=st.integers(1, 7),
    width=st.integers(1, 9),
    name=st.sampled_from(NAMES),
    rows=st.sampled_from([32, 64]),
    columns=st.sampled_from([1, 8, 64]),
    longest_run=st.sampled_from([None, 1, 3]),
    side=st.sampled_from(["query", "key"]),
    data=st.data(),
)
def test_decoded_plan_is_the_pattern(text_len, height, width, name, rows, columns, longest_run, side, data):
    pattern = every_pattern(text_len, (height, width))[name]
    n = data.draw(st.integers(1, pattern.seq_len))
    plan = compile_plan(pattern, n, TileShape(rows, columns, longest_run), side)
    assert longest_run is None or plan.entries[:, 1].max() <= longest_run
    expected = pattern.dense()[:n, :n].numpy()
    assert np.array_equal(decode(plan.packed), expected if side == "query" else expected.T)


@pytest.mark.parametrize(
    ("longest_run", "split", "max_splits"),
    [(1, None, None), (1, 1, None), (1, 2, None), (1, 5, None), (3, 5, None), (1, 2, 9)],
)
def test_work_items_cover_every_entry_once(longest_run, split, max_splits):
    """Every entry belongs to one item; partial results of a tile are numbered in the order of its entries."""
    plan = compile_plan(P.row(100, (9, 11)), 199, TileShape(64, 16, longest_run, split, max_splits), "key")
    groups = plan.entries[:, 1]
    most = max(split or groups.sum(), groups.sum() // (max_splits or groups.sum()))
    done = np.zeros(len(plan.entries), int)
    sizes = []
    partials = {}
    for tile, begin, end, partial in plan.items:
        assert plan.begin[tile] <= begin < end <= plan.begin[tile + 1]
        sizes.append(groups[begin:end].sum())
        assert sizes[-1] < most + longest_run
        done[begin:end] += 1
        if partial < 0:
            assert (begin, end) == (plan.begin[tile], plan.begin[tile + 1])
        else:
            partials[partial] = tile, begin
    assert (done == 1).all()
    assert (np.diff(sizes) <= 0).all()
    listed = [(int(first) + i, int(tile)) for tile, first, count in plan.split_tiles for i in range(count)]
    assert [number for number, _ in listed] == list(range(len(partials))) == list(range(int(plan.packed[10])))
    assert [tile for _, tile in listed] == [partials[number][0] for number, _ in listed]
    assert sorted(partials.values()) == [partials[number] for number in sorted(partials)]
    assert bool(partials) == (split is not None)


def busy(plan, threads):
    """The utilisation of threads that each take the next work item of one head when they are free."""
    until = [0] * threads
    for _, begin, end, _ in plan.items:
        heapq.heapreplace(until, until[0] + int(plan.entries[begin:end, 1].sum()))
    return sum(until) / (threads * max(until))


def test_one_head_fills_many_threads():
    token = torch.arange(2048)
    ahead = token - token[:, None]
    few_see_all = P.from_mask((ahead <= 0) & ((ahead > -64) | (token >= 2016)[:, None]))
    for pattern, threads in [(P.causal(256, (32, 32)), 64), (P.causal(256, (64, 64)), 128), (few_see_all, 16)]:
        plan = compile_plan(pattern, pattern.seq_len, TILES["cpu"].query)
        whole = compile_plan(pattern, pattern.seq_len, replace(TILES["cpu"].query, split=None))
        assert busy(plan, threads) > 0.75 and busy(whole, threads) < 0.55
        assert len(plan.items) < len(plan.rows) + 2 * TILES["cpu"].query.max_splits


@pytest.mark.parametrize("grid", [16, 32, 64])
def test_sparse_patterns_are_not_split_on_the_cpu(grid):
    for pattern in (P.row(256, (grid, grid)), P.column(256, (grid, grid)), P.conv(256, (grid, grid))):
        assert not len(compile_plan(pattern, pattern.seq_len, TILES["cpu"].query).split_tiles)


def test_the_order_packs_columns():
    """In column order a tile needs the text and its own column; in raster order it would need every column."""
    pattern = P.column(256, (32, 32))
    raster = P.from_mask(pattern.dense(), text_len=256)
    assert compile_plan(pattern, 1280).pairs < 1.1 * pattern.nnz
    assert compile_plan(raster, 1280).pairs > 2 * pattern.nnz


@pytest.mark.parametrize("shape", [TileShape(), TileShape(64, 64, 1)])
@pytest.mark.parametrize("pattern", [P.conv(256, (32, 32)), P.corner_conv(256, (32, 32))], ids=str)
def test_patches_pack_neighbourhoods(pattern, shape):
    """64, 32 and 16 consecutive tokens are patches of the image, so tiles need fewer keys than strips of rows."""
    raster = P.from_mask(pattern.dense(), text_len=256)
    rows, columns = (pattern.order()[256:320] - 256).div(32, rounding_mode="floor"), pattern.order()[256:320] % 32
    assert rows.max() == columns.max() == 7
    assert rows[:16].max() == 1 and columns[:16].max() == 7
    assert computed(compile_plan(pattern, 1280, shape)) < 0.97 * computed(compile_plan(raster, 1280, shape))


def computed(plan):
    """The number of pairs in live 16 x 16 blocks, or in whole groups if these are narrower."""
    if plan.gathered.shape[1] < 16:
        return plan.pairs
    return 256 * sum(int(groups) * int(live).bit_count() for _, groups, _, live in plan.entries)


def test_large_grids_stream():
    """256 text tokens and a 128 x 128 grid: an N x N matrix would take 277 MB, the plan takes under 10."""
    plan = compile_plan(P.row(256, (128, 128)), 256 + 128 * 128)
    assert plan.packed.nbytes < 10e6
    assert plan.pairs < 1.2 * P.row(256, (128, 128)).nnz


def test_plans_are_cached_by_value():
    device, shape = torch.device("cpu"), TileShape()
    assert plan_tensor(P.row(3, (2, 2)), 7, device, shape) is plan_tensor(P.row(3, [2, 2]), 7, device, shape)


def test_sizes_are_those_of_the_plan():
    plan, sizes = plan_tensor(P.row(100, (9, 11)), 199, torch.device("cpu"), TileShape(64, 32, 1, 2), "key")
    header = plan.tolist()
    assert sizes.length == plan.numel() and (sizes.rows, sizes.columns) == (64, 32)
    assert [sizes.items, sizes.partials, sizes.split_tiles] == header[9:12]
    assert sizes.partials > sizes.split_tiles > 0


@pytest.mark.parametrize(("header", "file"), [(PlanHeader, "plan.h"), (ScheduleHeader, "decode_schedule.h")])
def test_headers_are_the_same_in_python_and_c(header, file):
    text = (Path(__file__).parents[1] / "csrc" / "common" / file).read_text()
    (fields,) = re.findall(rf"enum {header.__name__} : int \{{([^}}]*)\}}", text)
    assert re.findall(r"(\w+) = (\d+),", fields) == [(word.name.lower(), str(int(word))) for word in header]


@pytest.mark.parametrize("side", ["query", "key"])
def test_equal_masks_are_stored_once(side):
    plan = compile_plan(P.row(64, (32, 32)), 64 + 1024, side=side)
    assert len(plan.masks) < len(plan.gathered) / 4


@pytest.mark.parametrize("name", NAMES)
def test_plans_and_schedules_are_compiled_on_the_host(name, seed):
    """Compilation does not use torch's default device."""
    pattern = every_pattern(5, (6, 11))[name]
    plan, schedule = compile_plan(pattern, 60).packed, compile_schedule.__wrapped__(pattern).packed
    with torch.device("meta"):
        assert np.array_equal(compile_plan(pattern, 60).packed, plan)
        assert np.array_equal(compile_schedule.__wrapped__(pattern).packed, schedule)

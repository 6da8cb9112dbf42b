"""One head of sparse attention on growing images: time, memory and plan size against the number of tokens."""

import pytest
import torch
from common.attention import Case, Inputs
from comparison import ROUNDS, SETTING, seconds
from memory import peak_bytes
from torch.nn.functional import scaled_dot_product_attention as sdpa

import dalle_kernels as dk
from dalle_kernels.backends.native.tiles import TILES
from dalle_kernels.backends.plans import plan_tensor, plan_tensors

TEXT, SIDES = (4, (4, 8)) if SETTING.tiny else (256, (32, 64, 128))
CAUSAL, DIRECTIONS = "causal SDPA", ("forward", "forward and backward")


def prepare(pattern):
    dk.prepare(pattern, device="cpu", dtype=torch.float32, head_dim=64)


def function(attention, name, direction, side):
    """One pass of our attention, or of causal SDPA, over random inputs."""
    case = Case(name, direction.split()[-1], TEXT, (side, side), batch=1, heads=1, dtype="float32")
    inputs = Inputs(case, "cpu")
    pattern = inputs.pattern
    prepare(pattern)

    def attend(q, k, v):
        return sdpa(q, k, v, is_causal=True) if attention == CAUSAL else dk.sparse_attention(q, k, v, pattern)

    if direction == "forward":
        return inputs.function(attend)
    return lambda: torch.autograd.grad(attend(*inputs.tensors), inputs.tensors, inputs.grad)


def plan_facts(pattern):
    """Size of the plan for a CPU in bytes, and the seconds to compile it."""
    plan_tensor.cache_clear()
    plan_tensors.cache_clear()
    took = seconds(lambda: prepare(pattern))
    return plan_tensors(pattern, pattern.seq_len, torch.device("cpu"), TILES["cpu"])[0].nbytes, took


@pytest.mark.parametrize("name", ["row", "column", "conv"])
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_one_head(versus, direction, side, name):
    """256 text tokens and an image of side × side tokens, one head of 64, float32. Peaks are the memory of the first
    call beyond its inputs, including results and workspaces, in a new process. 3 rounds for 128×128.
    """
    pattern = getattr(dk.AttentionPattern, name)(TEXT, (side, side))
    peaks = {
        attention: peak_bytes(function, (attention, name, direction, 4), (attention, name, direction, side))
        for attention in ("ours", CAUSAL)
    }
    size, compiling = plan_facts(pattern)
    facts = {
        "tokens": pattern.seq_len,
        "allowed pairs": pattern.nnz,
        **{f"{attention}, peak MB": peak / 1e6 for attention, peak in peaks.items() if peak is not None},
        "plan, kB": size / 1e3,
        "plan, ms to compile": compiling * 1e3,
    }
    ours, causal = (function(attention, name, direction, side) for attention in ("ours", CAUSAL))
    per_pair = {"ours, ns per pair": 1e9 / pattern.nnz}
    versus(ours, {CAUSAL: causal}, rounds=ROUNDS if side <= 64 else 3, derived=per_pair, facts=facts)

"""torch.compile support, and the modules that importing the package loads."""

import pickle
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import FrozenInstanceError

import pytest
import torch

import dalle_kernels as dk
from dalle_kernels.compile import constant_result

PATTERNS = {
    "row": lambda text, grid: dk.AttentionPattern.row(text, grid),
    "column": lambda text, grid: dk.AttentionPattern.column(text_len=text, grid=grid),
    "conv": lambda text, grid: dk.AttentionPattern.conv(text, grid, kernel=3, edge="clip"),
    "axial_row": lambda text, grid: dk.AttentionPattern.axial_row(text, grid),
    "corner_conv": lambda text, grid: dk.AttentionPattern.corner_conv(text, grid, 3),
    "causal": lambda text, grid: dk.AttentionPattern.causal(text, grid),
}


def test_the_mark_is_that_of_pytorch():
    def plain():
        pass

    def marked():
        pass

    torch.compiler.assume_constant_result(plain)
    assert vars(plain) == vars(constant_result(marked)) != {}


def test_importing_imports_no_dynamo():
    code = (
        "import sys, torch; before = set(sys.modules); import dalle_kernels;"
        "print(*sorted(name for name in set(sys.modules) - before if name.split('.')[:2] == ['torch', '_dynamo']));"
        "print('dalle_kernels' in sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout == "\nTrue\n"


@pytest.mark.parametrize("fullgraph", [True, False])
@pytest.mark.parametrize("name", PATTERNS)
def test_a_pattern_made_in_compiled_code(seed, name, fullgraph):
    def step(q, k, v):
        pattern = PATTERNS[name](6, (4, (q.shape[2] - 6) // 4))
        return dk.sparse_attention(q * 2, k, v, pattern).sin(), pattern

    torch.compiler.reset()
    q, k, v = torch.randn(3, 1, 2, 26, 32).unbind(0)
    compiled = torch.compile(step, fullgraph=fullgraph, backend="aot_eager")
    for n in (26, 22, 18, 26):
        part = [x[:, :, :n] for x in (q, k, v)]
        (ours, pattern), (expected, same) = compiled(*part), step(*part)
        torch.testing.assert_close(ours, expected)
        assert pattern == same and hash(pattern) == hash(same)


@pytest.mark.parametrize("name", PATTERNS)
def test_patterns_are_values(name):
    pattern, other = PATTERNS[name](6, (4, 5)), PATTERNS[name](6, (4, 6))
    again = pickle.loads(pickle.dumps(pattern))
    assert again == pattern == PATTERNS[name](6, [4, 5]) and hash(again) == hash(pattern)
    assert pattern != other
    with pytest.raises(FrozenInstanceError):
        pattern.text_len = 7


def compiled(pattern, fullgraph):
    """Self-attention in torch.compile, and the list of its graphs."""
    graphs = []

    def backend(module, inputs):
        graphs.append(module)
        return module.forward

    torch._dynamo.reset()
    attend = torch.compile(lambda x: dk.sparse_attention(x, x, x, pattern), backend=backend, fullgraph=fullgraph)
    return attend, graphs


@pytest.mark.parametrize(("limit", "fullgraph", "count"), [(8, False, 8), (8, True, 8), (12, True, 12)])
def test_every_length_is_compiled_once(limit, fullgraph, count, seed):
    pattern = dk.AttentionPattern.row(5, (3, 4))
    attend, graphs = compiled(pattern, fullgraph)
    fails = fullgraph and limit < 12  # otherwise further lengths run eagerly
    error = pytest.raises(torch._dynamo.exc.FailOnRecompileLimitHit) if fails else nullcontext()
    with torch._dynamo.config.patch(recompile_limit=limit), error:
        for n in [*range(1, 13), *range(1, 13)]:
            x = torch.randn(2, 1, n, 8)
            assert torch.equal(attend(x), dk.sparse_attention(x, x, x, pattern))
    assert len(graphs) == count


def test_two_graphs_serve_every_batch_size(seed):
    attend, graphs = compiled(dk.AttentionPattern.row(5, (3, 4)), fullgraph=True)
    for batch in range(2, 14):
        attend(torch.randn(batch, 2, 17, 8))
    assert len(graphs) == 2

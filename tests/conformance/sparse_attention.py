"""sparse_attention: the error bound on out, lse and the gradients; masked pairs, NaN, layouts, split tiles, and batch
invariance.
"""

from __future__ import annotations

import torch

import dalle_kernels as dk
from accuracy import assert_accurate
from patterns_for_tests import every_pattern

from .target import DTYPES, Case, Cases, P, Target, captured, compiled, need_memory, refuses_double_backward, same, what

LAYOUTS = ("bhnd", "bnhd", "qkv", "offset")
TEXT, GRID = 21, (8, 10)  # 101 tokens: two tiles of 64, the second with a partial block of 16 rows


def cases(target: Target) -> list[Case]:
    found = Cases(target, "attention")
    add = found.add
    splits = (None, 1) if target.kernels else (None,)
    for dtype in target.dtypes:
        for name in target.patterns(dtype):
            dim = 32 if target.simulated and dtype == "float32" else 64
            add(f"{name} {dtype}", accuracy, name, dtype, dim=dim)
            if target.kernels and name in ("causal", "conv-clip", "mask"):
                add(f"{name} {dtype}, split tiles", accuracy, name, dtype, dim=40, split=1, rare=True)
    for dtype in target.dtypes:
        for dim in (16, 31, 33, 80, 127, 128):
            add(f"head dim {dim} {dtype}", accuracy, "conv-clip", dtype, dim=dim, rare=dim not in (33, 128))
        for layout in LAYOUTS[1:]:
            add(f"{layout} {dtype}", accuracy, "column", dtype, dim=48, layout=layout, rare=layout == "qkv")
        for n in (1, 15, 64, 65, 90):
            add(f"{n} tokens {dtype}", accuracy, "column", dtype, dim=32, n=n, rare=n not in (1, 65))
        for scale in (0.0, 0.37, -0.2):
            add(f"scale {scale} {dtype}", accuracy, "causal", dtype, dim=32, n=90, scale=scale, rare=scale > 0)
        for name in ("row", "column", "conv") if target.kernels else ():
            often = target.simulated and name == "row" and dtype != "float32"
            full = dtype == "float16" and not target.simulated
            add(f"{name} {dtype}, the paper's size", papers_size, name, dtype, slow=not often, full=full)
        for split in splits:
            kind = f"{dtype}{', split tiles' if split else ''}"
            for factor in (5.0, 40.0):
                name = f"logits times {factor:g} {kind}"
                add(name, accuracy, "row", dtype, factor=factor, split=split, rare=not split)
            if target.kernels:
                add(f"bits {kind}", bits, dtype, split, rare=not split)
                for name in ("conv-clip", "mask"):
                    add(f"hidden pairs {name} {kind}", hidden_pairs, name, dtype, split, rare=name != "mask")
                for which, tensor in enumerate(("q", "k", "v", "the gradient")):
                    add(f"NaN in {tensor} {kind}", nan, which, dtype, split, rare=dtype != "float16")
        if target.kernels:
            add(f"expanded gradient {dtype}", expanded_gradient, dtype)
            add(f"graph {dtype}", graph, dtype, rare=True)
    for dim in (1, 2, 3, 7):
        add(f"head dim {dim}", tiny_head_dim, dim, rare=dim > 1)
    for check in (strides, one_token, empty_batch, *([double_backward] if target.kernels else [])):
        add(check.__name__.replace("_", " "), check)
    return found.completed(one_graph, beyond_32_bits)


def plain_attention(q, k, v, mask, scale):
    """The baseline of the error bound: softmax(q kT * scale, masked) v in the inputs' dtype; returns (out, lse)."""
    scores = (q @ k.transpose(-1, -2) * scale).masked_fill(~mask, float("-inf"))
    return scores.softmax(-1) @ v, scores.logsumexp(-1)


def run(attention, tensors, grad):
    """Outputs and input gradients of attention(q, k, v) -> (out, lse)."""
    leaves = [x.detach().clone(memory_format=torch.preserve_format).requires_grad_() for x in tensors]
    out, lse = attention(*leaves)
    out.backward(grad.to(out.dtype))
    return [out.detach(), lse.detach(), *(x.grad for x in leaves)]


def attend(target, pattern, tensors, grad=None, scale=None):
    """[out, lse] or, with the gradient of out, [out, lse, dq, dk, dv]."""

    def attention(q, k, v):
        return dk.sparse_attention(q, k, v, pattern, scale=scale, return_lse=True, backend=target.backend)

    return list(attention(*tensors)) if grad is None else run(attention, tensors, grad)


def make(target, layout, batch, heads, n, dim, dtype):
    """q, k, v [batch, heads, n, dim] in a memory layout."""
    if layout == "bhnd":
        return target.randn(3, batch, heads, n, dim, dtype=dtype).unbind(0)
    if layout == "bnhd":
        return target.randn(3, batch, n, heads, dim, dtype=dtype).transpose(2, 3).unbind(0)
    if layout == "qkv":  # one fused projection, split by views
        return target.randn(batch, n, 3, heads, dim, dtype=dtype).permute(2, 0, 3, 1, 4).unbind(0)
    storage = torch.full((3, batch, heads, n + 2, dim + 3), torch.nan, dtype=dtype, device=target.device)
    views = storage[..., 1:-1, 2:-1]  # surrounded by NaN
    views.copy_(torch.randn(views.shape))
    return views.unbind(0)


def check(target, pattern, tensors, grad, dtype, scale=None):
    """Checks the error bound on all outputs and gradients. Callers use at least 16 (batch, head) pairs: the largest
    error of one head comes from the few queries with few keys, and is a matter of chance; over many heads it is stable.
    """
    n, dim = tensors[0].shape[2:]
    used = dim**-0.5 if scale is None else scale
    mask = pattern.dense(0, n)[:, :n].to(target.device)
    ours = attend(target, pattern, tensors, grad, scale)
    exact = run(lambda *x: plain_attention(*x, mask, used), [x.double() for x in tensors], grad)
    plain = run(lambda *x: plain_attention(*x, mask, used), tensors, grad)
    plain[1] = plain[1].float()
    for name, a, e, p in zip(("out", "lse", "dq", "dk", "dv"), ours, exact, plain):
        assert_accurate(a, e, p, what(target, "attention", name, dtype))


def accuracy(target, name, dtype, *, dim=64, n=None, layout="bhnd", factor=1.0, scale=None, split=None):
    pattern = every_pattern(TEXT, GRID)[name]
    n = n or pattern.seq_len
    batch = 4 if target.simulated else max(5, 2**17 // (4 * n * dim))
    q, k, v = make(target, layout, batch, 4, n, dim, DTYPES[dtype])
    grad = make(target, "bnhd" if layout == "offset" else "offset", batch, 4, n, dim, DTYPES[dtype])[0]
    with target.split_after(split):
        check(target, pattern, (q * factor, k, v), grad, dtype, scale)


def papers_size(target, name, dtype):
    """At this size tiles are split by default."""
    pattern = getattr(P, name)(256, (32, 32))
    batch, heads = (1, 1) if target.simulated else (8, 2)
    *tensors, grad = target.randn(4, batch, heads, pattern.seq_len, 64, dtype=DTYPES[dtype]).unbind(0)
    check(target, pattern, tensors, grad, dtype)


def tiny_head_dim(target, dim):
    """Uses a tolerance, because with so few elements plain PyTorch's float32 sums are nearly exact."""
    pattern = every_pattern(TEXT, GRID)["row"]
    n = pattern.seq_len
    *tensors, grad = target.randn(4, 2, 2, n, dim).unbind(0)
    mask = pattern.dense().to(target.device)
    exact = run(lambda *x: plain_attention(*x, mask, dim**-0.5), [x.double() for x in tensors], grad)
    for a, e in zip(attend(target, pattern, tensors, grad), exact):
        torch.testing.assert_close(a.double(), e, rtol=1e-5, atol=1e-5)


def expanded_gradient(target, dtype):
    """A gradient with strides of 0, as from the backward of a sum."""
    pattern = every_pattern(TEXT, GRID)["row"]
    tensors = target.randn(3, 1, 4, pattern.seq_len, 32, dtype=DTYPES[dtype]).unbind(0)
    grad = target.randn(32, dtype=DTYPES[dtype]).expand(1, 4, pattern.seq_len, 32)
    same(attend(target, pattern, tensors, grad), attend(target, pattern, tensors, grad.contiguous()))


def hidden_pairs(target, name, dtype, split):
    """The finite values of a key do not affect queries that do not attend to it, forward and backward; nor do those of
    a query affect the gradients of keys that it does not attend to.
    """
    pattern = every_pattern(TEXT, GRID)[name]
    n = pattern.seq_len
    tensors = target.randn(4, 1, 2, n, 48, dtype=DTYPES[dtype])
    token = int(torch.randint(1, n - 1, ()))
    big = 6e4 if dtype == "float16" else 1e30
    mask = pattern.dense().to(target.device)
    with target.split_after(split):
        before = attend(target, pattern, tensors[:3], tensors[3])
        for changed, results, blind in (((1, 2), (0, 1, 2), ~mask[:, token]), ((0, 3), (3, 4), ~mask[token])):
            other = tensors.clone()
            other[changed[0], :, :, token], other[changed[1], :, :, token] = big, -big
            after = attend(target, pattern, other[:3], other[3])
            same([after[i][:, :, blind] for i in results], [before[i][:, :, blind] for i in results])
            assert not all(torch.equal(after[i], before[i]) for i in results)


def nan(target, which, dtype, split):
    """NaN must propagate: every query that attends to a NaN has a NaN result and a NaN gradient."""
    pattern = every_pattern(TEXT, GRID)["row"]
    n = pattern.seq_len
    tensors = target.randn(4, 1, 2, n, 32, dtype=DTYPES[dtype])
    tensors[which, 0, 0, 30] = torch.nan
    seen = torch.arange(n) == 30 if which in (0, 3) else pattern.dense()[:, 30]
    with target.split_after(split):
        out, lse, *grads = (x.cpu() for x in attend(target, pattern, tensors[:3], tensors[3]))
    assert grads[0].isnan().any(-1)[0, 0, seen].all()
    assert which == 3 or out.isnan().any(-1)[0, 0, seen].all()
    assert which > 1 or torch.equal(lse[0, 0].isnan(), seen)  # lse does not depend on the values
    assert not any(result[0, 1].isnan().any() for result in (out, lse, *grads))


def bits(target, dtype, split):
    """Batch invariance: a (batch, head) has the same bits whatever the others are, and in every run."""
    pattern = every_pattern(TEXT, GRID)["corner_conv"]
    tensors = target.randn(4, 3, 2, pattern.seq_len, 64, dtype=DTYPES[dtype])
    with target.split_after(split):
        expected = attend(target, pattern, tensors[:3], tensors[3])
        for part in ((slice(None), slice(None)), (slice(1, 2), slice(1, None)), (slice(2, None), slice(None))):
            some = [x[part] for x in tensors]
            same(attend(target, pattern, some[:3], some[3]), [x[part] for x in expected])


def strides(target):
    """The output has the strides of q, so that merging heads is a view."""
    pattern = P.row(8, (4, 4))
    q, k, v = make(target, "bnhd", 2, 3, 24, 32, torch.float32)
    out = dk.sparse_attention(q, k, v, pattern, backend=target.backend)
    assert out.stride() == q.stride()
    out.transpose(1, 2).reshape(2, 24, 96).view(-1)  # no copy


def one_token(target):
    q, k, v, grad = target.randn(4, 4, 4, 1, 32)
    out, lse, grad_q, grad_k, grad_v = attend(target, P.row(4, (2, 2)), (q, k, v), grad)
    torch.testing.assert_close(lse, (q * k).sum(-1) * 32**-0.5)
    for a, b in ((out, v), (grad_v, grad), (grad_q, torch.zeros_like(q)), (grad_k, torch.zeros_like(q))):
        torch.testing.assert_close(a, b, rtol=2 * torch.finfo(torch.float32).eps, atol=1e-6 * (not target.kernels))


def empty_batch(target):
    q = target.randn(0, 4, 9, 32)
    out, lse, *grads = attend(target, P.row(4, (3, 3)), (q, q, q), q)
    assert out.shape == (0, 4, 9, 32) and lse.shape == (0, 4, 9) and all(x.shape == q.shape for x in grads)


def double_backward(target):
    q, k, v = (x.requires_grad_() for x in target.randn(3, 1, 1, 9, 32).unbind(0))
    refuses_double_backward(dk.sparse_attention(q, k, v, P.row(3, (2, 3)), backend=target.backend), q)


def one_graph(target):
    pattern = every_pattern(6, (4, 5))["mask"]

    def step(q, k, v):
        return dk.sparse_attention(q * 2, k, v, pattern, backend=target.backend).sin()

    q, k, v = (x.requires_grad_() for x in target.randn(3, 1, 2, 26, 32).unbind(0))
    function = compiled(step)
    for n in (26, 20, 13):
        part = [x[:, :, :n] for x in (q, k, v)]
        ours = torch.autograd.grad(function(*part).sum(), (q, k, v))
        for a, b in zip(ours, torch.autograd.grad(step(*part).sum(), (q, k, v))):
            torch.testing.assert_close(a, b)


def graph(target, dtype):
    """A captured graph of forward and backward, replayed with other inputs."""
    pattern = P.row(40, (9, 11))
    q, k, v, grad = target.randn(4, 2, 3, pattern.seq_len, 64, dtype=DTYPES[dtype])
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]

    def step():
        out, lse = attend(target, pattern, leaves)
        return [out.detach(), lse, *torch.autograd.grad(out, leaves, grad)]

    replay = captured(target, step)
    for _ in range(2):
        with torch.no_grad():
            for x in (*leaves, grad):
                x.copy_(target.randn(*x.shape))
        same(replay(), step())


def beyond_32_bits(target):
    """Tensors of more than 2^31 elements."""
    pattern = P.row(256, (32, 32))
    need_memory(60)
    batch = 2**31 // (16 * pattern.seq_len * 64) + 2
    like = dict(dtype=torch.bfloat16, device=target.device)
    q, k, v, grad = (torch.randn(batch, 16, pattern.seq_len, 64, **like) for _ in range(4))
    whole = attend(target, pattern, (q, k, v), grad)
    same([x[-1:] for x in whole], attend(target, pattern, (q[-1:], k[-1:], v[-1:]), grad[-1:]))

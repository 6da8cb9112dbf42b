"""gumbel_softmax: the error bound on y, the KL and the gradient, with the same noise; layouts, masked and non-finite
rows, and batch invariance.
"""

from __future__ import annotations

import functools
import math

import torch

import dalle_kernels as dk
from accuracy import assert_accurate
from dalle_kernels.philox import gumbel, gumbel_noise, random_bits

from .target import DTYPES, Case, Cases, Target, captured, compiled, need_memory, refuses_double_backward, same, what

LAYOUTS = ("contiguous", "transposed", "strided", "offset", "classes last")
# (shape, dim) with few and many classes and positions. The largest error over a few positions is a matter of chance;
# over many it is stable.
SHAPES = (
    ((16, 65, 16, 8), 1), ((2000, 130), 1), ((8, 50, 17, 15), 1), ((500, 3), 1), ((100, 20, 3), 1), ((60, 20, 50), 0),
    ((3, 5, 300), 1), ((2, 100, 400), 1),
)  # fmt: skip


def cases(target: Target) -> list[Case]:
    found = Cases(target, "gumbel")
    add = found.add
    for dtype in target.dtypes:
        for hard in (False, True):
            kind = f"{'hard' if hard else 'soft'} {dtype}"
            for number, (shape, dim) in enumerate(SHAPES):
                add(f"{kind} {shape} dim {dim}", accuracy, dtype, hard, shape, dim, rare=number > 1)
            large = dict(scale=30.0, rare=True)
            add(f"large logits {kind}", accuracy, dtype, hard, (40, 70, 50), 1, **large)
            add(f"large, far logits {kind}", accuracy, dtype, hard, (2000, 70), 1, offset=300.0, **large)
            add(f"8192 codes {kind}", accuracy, dtype, hard, (2, 8192, 4, 8), 1, slow=True)
            add(f"8192 codes last {kind}", accuracy, dtype, hard, (32, 8192), 1, slow=True)
            if target.device != "cpu":
                add(f"the paper's size {kind}", accuracy, dtype, hard, (2, 8192, 32, 32), 1)
        if target.kernels:
            add(f"bits {dtype}", bits, dtype)
            add(f"graph {dtype}", graph, dtype, rare=True)
    for layout in LAYOUTS:
        for dim in range(3):
            name, shape = f"{layout} dim {dim}", (40, 19, 40)
            add(name, accuracy, "float32", False, shape, dim, layout=layout, rare=dim != 1)
    for shape in ((8, 70), (8, 70, 1), (1, 70, 8), (1, 70, 9), (1, 3, 8), (3000, 8)):
        for hard in (False, True):
            add(f"broken rows {shape} {'hard' if hard else 'soft'}", broken_rows, shape, hard)
    for shape, dim in (((40, 50), 1), ((3, 100, 33), 1), ((70, 2, 3), 0)):
        add(f"noise {shape}", noise, shape, dim)
    for check in (
        first_of_equals, soft_and_hard, extremes_of_tau, certain_choices, one_class, parts_of_the_gradient, without_kl,
        empty, *([double_backward] if target.kernels else []),
    ):  # fmt: skip
        add(check.__name__.replace("_", " "), check)
    return found.completed(one_graph, beyond_32_bits)


def plain_gumbel_softmax(x, seed, tau, hard, dim):
    """The baseline of the error bound, in x's dtype except for the logarithms of the noise: (y, kl)."""
    wide = torch.promote_types(x.dtype, torch.float32)
    noisy = x + gumbel_noise(x.shape, seed, wide).to(x.dtype)
    y = (noisy / tau).softmax(dim)
    log_p = x.to(wide).log_softmax(dim)
    kl = (log_p.exp() * (log_p + math.log(x.shape[dim]))).sum(dim)
    return (y + (one_hot(noisy, dim) - y).detach() if hard else y), kl


def one_hot(x, dim):
    return torch.zeros_like(x).scatter_(dim, x.argmax(dim, keepdim=True), 1.0)


def relax(target, x, seed, tau=0.7, hard=False, dim=1):
    """(y, kl) of the target."""
    return dk.gumbel_softmax(x, tau, hard, dim=dim, seed=seed, return_kl=True, backend=target.backend)


def run(function, x, grad_y, grad_kl):
    """y, kl and the gradient of function(x) -> (y, kl)."""
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    y, kl = function(x)
    torch.autograd.backward([y, kl], [grad_y.to(y.dtype), grad_kl.to(kl.dtype)])
    return y.detach(), kl.detach(), x.grad


def make(target, layout, shape, dtype, scale=2.0, offset=0.0):
    x = (target.randn(*shape) * scale + offset).to(dtype)
    if layout == "transposed":
        return x.permute(*range(x.ndim)[::-1]).contiguous().permute(*range(x.ndim)[::-1])
    if layout == "classes last":  # of dim 1: channels_last
        return x.movedim(1, -1).contiguous().movedim(-1, 1)
    if layout == "strided":
        return x.repeat_interleave(2, -1)[..., ::2]
    if layout == "offset":
        storage = torch.full([n + 2 for n in shape], torch.nan, dtype=dtype, device=target.device)  # surrounded by NaN
        return storage[(slice(1, -1),) * len(shape)].copy_(x)
    return x


def accuracy(
    target, dtype, hard, shape, dim, layout="contiguous", scale=2.0, offset=0.0, taus=(1 / 16, 1.0, 5.0)
):
    if target.simulated:
        shape = smaller(shape, dim)
    x = make(target, layout, shape, DTYPES[dtype], scale, offset)
    seed, grad_y, grad_kl = target.seeds(), target.randn(*shape, dtype=x.dtype), target.randn(*x.sum(dim).shape)
    for tau in taus if not target.simulated else [taus[int(torch.randint(len(taus), ()))]]:
        ours = run(functools.partial(relax, target, seed=seed, tau=tau, hard=hard, dim=dim), x, grad_y, grad_kl)
        plainly = functools.partial(plain_gumbel_softmax, seed=seed, tau=tau, hard=hard, dim=dim)
        exact, plain = (run(plainly, logits, grad_y, grad_kl) for logits in (x.double(), x))
        assert ours[1].dtype == torch.float32
        for name, a, e, p in zip(("y", "kl", "gradient"), ours, exact, plain):
            if name == "y" and hard:
                assert_argmax(a, x, seed, dim)
            else:
                assert_accurate(a, e, p, what(target, "gumbel", name, dtype))


def smaller(shape, dim):
    """`shape` with the same classes and at most about 500 positions."""
    shape = list(shape)
    positions = math.prod(shape) // shape[dim]
    largest = max((n, i) for i, n in enumerate(shape) if i != dim)[1]
    shape[largest] = max(1, shape[largest] * min(500, positions) // positions)
    return tuple(shape)


def assert_argmax(y, x, seed, dim):
    """Asserts that y is the exact one-hot of the largest noisy logit, up to ties within float32 rounding."""
    noisy = x.double() + gumbel_noise(x.shape, seed, torch.float64)
    assert ((y == 0) | (y == 1)).all() and (y.sum(dim) == 1).all()
    short = noisy.amax(dim) - (noisy * y).sum(dim)
    assert short.max() < 1e-6 * noisy.abs().max(), f"a value {short.max():.3g} below the largest was taken"


def broken_rows(target, shape, hard):
    """-inf excludes a class and affects no other; rows with NaN or +inf, or only -inf, give NaN like the reference."""
    classes, positions = shape[1], math.prod(shape) // shape[1]
    rows = target.randn(positions, classes)
    rows[0, 1:] = -torch.inf
    rows[1, :-1] = -torch.inf
    rows[2, ::2] = -torch.inf
    rows[3, 2] = -torch.inf
    rows[4, 1], rows[5, 2], rows[6] = torch.nan, torch.inf, -torch.inf
    x = rows.T.reshape(shape) if shape[0] == 1 else rows.view(shape)
    seed, grad_y, grad_kl = target.seeds(), target.randn(*shape), target.randn(*x.sum(1).shape)
    ours = run(lambda x: relax(target, x, seed, hard=hard), x, grad_y, grad_kl)
    reference = Target("reference", target.device)
    for a, e in zip(ours, run(lambda x: relax(reference, x, seed, hard=hard), x, grad_y, grad_kl)):
        torch.testing.assert_close(a, e, equal_nan=True, rtol=1e-5, atol=1e-5)
    y, kl, grad = (t.movedim(1, -1).reshape(positions, -1) if t.shape == x.shape else t.flatten() for t in ours)
    good = [i for i in range(positions) if i not in (4, 5, 6)]
    assert all(t[good].isfinite().all() for t in (y, kl, grad)) and y[4:7].isnan().all()
    masked = rows[good] == -torch.inf
    assert masked.any() and (y[good][masked] == 0).all() and (grad[good][masked] == 0).all()
    torch.testing.assert_close(kl[0], torch.tensor(math.log(classes), device=kl.device))  # a single class remains


def noise(target, shape, dim):
    """For logits 0 and tau 1, log y is the noise up to a constant. Seeds cover all 64 bits."""
    for key in (0, -1, 0x299F31D0A4093822, int(target.seeds())):
        expected = gumbel_noise(shape, torch.tensor(key, device=target.device), torch.float64).log_softmax(dim)
        y = dk.gumbel_softmax(torch.zeros(shape, device=target.device), dim=dim, seed=key, backend=target.backend)
        assert (y.double().log() - expected).abs().max() < 2e-6


def first_of_equals(target):
    """Ties go to the first class: 1e10 absorbs the noise, which is at most 23."""
    x = torch.zeros(6, 900, 4, device=target.device)
    first = torch.randint(0, 600, (6, 4), device=target.device)
    for offset in (0, 1, 33, 290):
        x.scatter_(1, (first + offset)[:, None], 1e10)
    for logits in (x, x.movedim(1, 2).reshape(24, 900)):
        y = dk.gumbel_softmax(logits, hard=True, dim=1, seed=int(target.seeds()), backend=target.backend)
        assert torch.equal(y.argmax(1).flatten(), first.flatten()) and (y.sum(1) == 1).all()


def soft_and_hard(target):
    """The soft and the hard variant select the same class."""
    x, seed = target.randn(4, 50, 6), target.seeds()
    soft, hard = (relax(target, x, seed, 0.5, hard)[0] for hard in (False, True))
    assert torch.equal(hard, one_hot(soft, 1))


def extremes_of_tau(target):
    x, seed = target.randn(20, 64), target.seeds()
    cold, hot = (relax(target, x, seed, tau)[0] for tau in (1e-30, 1e5))
    assert torch.equal(cold, relax(target, x, seed, hard=True)[0])
    assert (hot * 64 - 1).abs().max() < 40 / 1e5  # noisy logits differ by less than 40


def certain_choices(target):
    """The KL is 0 for uniform logits, and log(classes) if one class has all probability."""
    certain = torch.zeros(3, 200, device=target.device)
    certain[:, 5] = 500.0
    for logits, expected in ((torch.full_like(certain, 7.0), 0.0), (certain, math.log(200))):
        kl = relax(target, logits, target.seeds())[1]
        torch.testing.assert_close(kl, torch.full_like(kl, expected), rtol=1e-6, atol=1e-6)


def one_class(target):
    for shape, dim in (((5, 1), 1), ((1, 37), 0), ((2, 1, 3), 1)):
        x = target.randn(*shape)
        grads = target.randn(*shape), target.randn(*x.sum(dim).shape)
        y, kl, grad = run(lambda x, d=dim: relax(target, x, target.seeds(), dim=d), x, *grads)
        assert (y == 1).all() and (kl == 0).all() and (grad == 0).all()


def parts_of_the_gradient(target):
    """The gradients of y alone and of the KL alone."""
    seed = target.seeds()
    for which in (0, 1):
        grads = []
        for place in (target, Target("reference", target.device)):
            x = torch.linspace(-2, 3, 4 * 30, device=target.device).view(4, 30).requires_grad_()
            out = relax(place, x, seed)[which]
            weights = torch.arange(1, 1 + out.shape[-1], device=target.device)
            grads.append(torch.autograd.grad((out * weights).sum(), x)[0])
        torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-5)


def without_kl(target):
    """y has the same bits with and without the KL."""
    x, seed = target.randn(4, 30), target.seeds()
    for hard in (False, True):
        y = dk.gumbel_softmax(x, 0.7, hard, dim=1, seed=seed, backend=target.backend)
        assert torch.equal(y, relax(target, x, seed, hard=hard)[0])


def empty(target):
    for shape, dim in (((0, 5), 1), ((2, 5, 0), 1)):
        x = torch.zeros(shape, device=target.device)
        y, kl, grad = run(lambda x, d=dim: relax(target, x, target.seeds(), dim=d), x, x, x.sum(dim))
        assert y.shape == grad.shape == x.shape and kl.shape == x.sum(dim).shape


def bits(target, dtype):
    """Batch invariance: an image has the same bits whatever the number of images after it, and in every run."""
    for shape in ((3, 300, 3, 7), (5, 300)):
        x, seed = target.randn(*shape, dtype=DTYPES[dtype]), target.seeds()
        grad_y, grad_kl = target.randn(*shape, dtype=DTYPES[dtype]), target.randn(*x.sum(1).shape)
        for hard in (False, True):
            relaxed = functools.partial(relax, target, seed=seed, hard=hard)
            whole = run(relaxed, x, grad_y, grad_kl)
            for n in (shape[0], 1):
                same(run(relaxed, x[:n], grad_y[:n], grad_kl[:n]), [part[:n] for part in whole])


def graph(target, dtype):
    """A captured graph of forward and backward, replayed with other inputs and another seed."""
    x, grad = target.randn(2, 3, 100, 50, dtype=DTYPES[dtype])
    x, seed = x.requires_grad_(), target.seeds()

    def step():
        y, kl = relax(target, x, seed)
        return [y.detach(), kl.detach(), torch.autograd.grad((y, kl), x, (grad, torch.ones_like(kl)))[0]]

    replay = captured(target, step)
    for _ in range(2):
        with torch.no_grad():
            x.copy_(target.randn(*x.shape))
            seed.copy_(target.seeds())
        same(replay(), step())


def double_backward(target):
    x = target.randn(3, 10).requires_grad_()
    refuses_double_backward(relax(target, x, target.seeds())[0].square(), x)


def one_graph(target):
    def step(x, tau):
        return dk.gumbel_softmax(x * 2, tau, dim=1, seed=7, backend=target.backend) + 1

    function = compiled(step)
    for tau in (1.0, 0.9, 0.8):
        x = target.randn(3, 20).requires_grad_()
        ours, expected = function(x, tau), step(x, tau)
        torch.testing.assert_close(ours, expected)
        grads = [torch.autograd.grad(y.square().sum(), x)[0] for y in (ours, expected)]
        torch.testing.assert_close(*grads)


def beyond_32_bits(target):
    """Elements beyond 2^31: the last image against plain PyTorch."""
    need_memory(24)
    shape = 2**31 // (8192 * 64 * 64) + 2, 8192, 64, 64
    x = torch.randn(shape, dtype=torch.bfloat16, device=target.device)
    seed, size = target.seeds(), math.prod(shape[1:])
    y = dk.gumbel_softmax(x, 0.7, dim=1, seed=seed, backend=target.backend)[-1]
    index = torch.arange(x.numel() - size, x.numel(), device=target.device)
    last = gumbel(random_bits(seed, torch.zeros_like(seed), index)).view_as(x[-1])
    torch.testing.assert_close(y.float(), ((x[-1].float() + last) / 0.7).softmax(0), rtol=2**-7, atol=1e-6)

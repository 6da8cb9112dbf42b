"""decode_attention, step by step: the error bound against full attention; batch invariance, strides, masked and absent
text, decoded text, and repeated steps.
"""

from __future__ import annotations

import torch

import dalle_kernels as dk
from accuracy import assert_accurate
from patterns_for_tests import every_pattern

from .target import DTYPES, Case, Cases, P, Target, captured, compiled, need_memory, same, what


def cases(target: Target) -> list[Case]:
    found = Cases(target, "decode")
    add = found.add
    sizes = dict(heads=1, candidates=2, prompts=2) if target.simulated else dict(heads=2, candidates=3, prompts=2)
    for dtype in target.dtypes:
        for name in target.patterns(dtype):
            pattern = every_pattern(19, (3, 4) if target.simulated else (6, 7))[name]
            for start in (0, 9):
                add(f"{name} {dtype} from {start}", accuracy, pattern, dtype, start=start, rare=start > 0, **sizes)
        pattern = P.conv(37, (2, 5), kernel=3)
        for dim in (1, 3, 31, 32, 33, 80, 127, 128):
            heads = 3 if dim > 16 else 40  # the largest error over a few elements is a matter of chance
            options = dict(dim=dim, heads=heads, start=7, rare=dim not in (1, 128))
            add(f"head dim {dim} {dtype}", accuracy, pattern, dtype, **options)
        pattern = P.row(70, (2, 6))
        for candidates in (1, 5, 16, 17, 40):
            options = dict(prompts=2, candidates=candidates, start=9, rare=candidates != 17)
            add(f"{candidates} candidates {dtype}", accuracy, pattern, dtype, **options)
        for text_len in (0, 1, 16, 65, 127, 300):
            pattern, rare = P.column(text_len, (3, 4)), text_len in (1, 16, 127)
            add(f"{text_len} text tokens {dtype}", accuracy, pattern, dtype, dim=64, start=9, rare=rare)
        pattern = P.conv(140, (5, 6), kernel=3)
        for factor in (5.0, 40.0):
            options = dict(candidates=8, heads=4, dim=64, start=28, factor=factor, rare=factor < 40)
            add(f"logits times {factor:g} {dtype}", accuracy, pattern, dtype, **options)
        for scale in (0.7, -0.3, 0.0):
            pattern = P.conv(4, (3, 5), kernel=3)
            add(f"scale {scale} {dtype}", accuracy, pattern, dtype, start=12, scale=scale, rare=True)
        add(f"many image keys {dtype}", accuracy, P.causal(3, (13, 10)), dtype, dim=64, start=128)
        add(f"many keys {dtype}", accuracy, P.causal(1100, (33, 32)), dtype, dim=64, start=33 * 32 - 1, rare=True)
        for given in (0, 3):
            options = dict(prompts=2, candidates=1, given=given, rare=given > 0)
            add(f"text from {given} {dtype}", accuracy, P.row(9, (2, 3)), dtype, **options)
        if target.backend in ("cpu", "reference"):
            for candidates in (1, 17):
                options = dict(prompts=3, candidates=candidates, lengths=[70, 0, 13])
                add(f"text lengths, {candidates} candidates {dtype}", accuracy, P.row(70, (2, 6)), dtype, **options)
            options = dict(prompts=3, candidates=1, lengths=[9, 0, 4], given=2)
            add(f"decoded text lengths {dtype}", accuracy, P.row(9, (2, 3)), dtype, **options)
        if target.kernels:
            add(f"bits {dtype}", bits, dtype)
            add(f"graph {dtype}", graph, dtype, rare=True)
            for layout in ("qkv", "heads last", "unaligned", "spread"):
                add(f"{layout} {dtype}", strided, dtype, layout)
    checks = [repeated_step, unseen_text, overflow, what_is_written]
    if target.backend not in ("cpu", "reference"):
        checks.append(text_lengths_are_refused)
    for check in checks:
        add(check.__name__.replace("_", " "), check)
    return found.completed(one_graph, beyond_32_bits)


def plain_attention(q, k, v, mask, scale):
    """The baseline of the error bound: softmax(q kT * scale, masked) v in the inputs' dtype."""
    return (q @ k.transpose(-1, -2) * scale).masked_fill(~mask, float("-inf")).softmax(-1) @ v


def make(target, pattern, prompts, candidates, heads, dim, dtype, start=0, factor=1.0):
    """q, k, v [P * C, H, N, D] with equal prefixes for all candidates of a prompt."""
    q, k, v = (target.randn(prompts, candidates, heads, pattern.seq_len, dim, dtype=dtype) for _ in range(3))
    given = pattern.text_len + start
    for x in (k, v):
        x[..., :given, :] = x[:, :1, :, :given].clone()
    return [x.flatten(0, 1) for x in (q * factor, k, v)]


def new_cache(pattern, k, v, prompts, start=0, layers=1, lengths=None, given=None):
    """A cache with the first `given` tokens, by default the whole prefix, and NaN in all other slots."""
    sequences, heads, _, dim = k.shape
    candidates, given = sequences // prompts, pattern.text_len + start if given is None else given
    sizes = dict(prompts=prompts, candidates=candidates, heads=heads, head_dim=dim, dtype=k.dtype, device=k.device)
    if lengths is not None:
        lengths = torch.tensor(lengths, device=k.device)
    cache = dk.DecodeCache([pattern] * layers, **sizes, start=start, text_lengths=lengths)
    for layer in range(layers):
        for name in ("prefix_k", "prefix_v", "image_k", "image_v"):
            getattr(cache.layer(layer), name).fill_(torch.nan)
        cache.prefill(layer, k[::candidates, :, :given], v[::candidates, :, :given])
    return cache


def step(target, new, cache, scale=None):
    return dk.decode_attention(*new, cache, 0, scale=scale, backend=target.backend)


def decode(target, pattern, q, k, v, prompts, start=0, steps=None, scale=None, lengths=None, given=None):
    """The outputs of `steps` tokens after the prefix (None: all), one step at a time: [P * C, H, steps, D]. `given`:
    number of prefilled tokens, if the rest of the text is decoded.
    """
    first = pattern.text_len + start if given is None else given
    cache, out = new_cache(pattern, k, v, prompts, start, lengths=lengths, given=given), []
    for token in range(first, pattern.seq_len if steps is None else first + steps):
        out.append(step(target, (x[:, :, token] for x in (q, k, v)), cache, scale))
        cache.advance()
    return torch.stack(out, 2)


def absent_text(pattern, lengths, candidates):
    """Which tokens of each sequence are text that does not exist: bool [P * C, N]."""
    tokens = torch.arange(pattern.seq_len)
    absent = (tokens < pattern.text_len) & (tokens >= torch.tensor(lengths)[:, None])
    return absent.repeat_interleave(candidates, 0)


def accuracy(
    target,
    pattern,
    dtype,
    *,
    prompts=1,
    candidates=3,
    heads=2,
    dim=48,
    start=0,
    factor=1.0,
    scale=None,
    lengths=None,
    given=None,
):
    """`lengths`: how many text tokens of each prompt exist; the others are NaN in the cache, and give 0. `given`: see
    `decode`.
    """
    tensors = make(target, pattern, prompts, candidates, heads, dim, DTYPES[dtype], start, factor)
    rows = slice(pattern.text_len + start if given is None else given, None)
    mask, used = pattern.dense(rows.start).to(target.device), dim**-0.5 if scale is None else scale
    if lengths is not None:
        absent = absent_text(pattern, lengths, candidates).to(target.device)
        mask = mask & ~absent[:, None, None]
    exact, plain = (
        plain_attention(q[:, :, rows], k, v, mask, used) for q, k, v in ([x.double() for x in tensors], tensors)
    )
    if lengths is not None:
        for x in (exact, plain):
            x.transpose(1, 2)[absent[:, rows]] = 0
        for x in tensors[1:]:
            x.transpose(1, 2)[absent] = torch.nan
    ours = decode(target, pattern, *tensors, prompts, start, scale=scale, lengths=lengths, given=given)
    assert_accurate(ours, exact, plain, what(target, "decode", "out", dtype))


def bits(target, dtype):
    """Batch invariance: a sequence has the same bits for any other candidates and prompts, and in every run."""
    pattern, candidates = P.conv(67, (2, 6), kernel=5), 18
    tensors = make(target, pattern, 2, candidates, 2, 40, DTYPES[dtype])
    steps = 2 if target.simulated else None
    whole = decode(target, pattern, *tensors, 2, steps=steps)
    assert torch.equal(decode(target, pattern, *tensors, 2, steps=steps), whole)
    for index in (0, 7, 17, 18, 29):
        alone = [x[index : index + 1] for x in tensors]
        assert torch.equal(decode(target, pattern, *alone, 1, steps=steps)[0], whole[index])
    one_prompt = [x[candidates:] for x in tensors]
    assert torch.equal(decode(target, pattern, *one_prompt, 1, steps=steps), whole[candidates:])


def strided(target, dtype, layout):
    """The results have the bits of contiguous inputs, also for rows that are not aligned to 16 bytes."""
    pattern = P.row(6, (3, 4))
    _, k, v = make(target, pattern, 2, 5, 3, 24, DTYPES[dtype])
    new = target.randn(3, 10, 3, 24, dtype=DTYPES[dtype])
    if layout == "qkv":
        views = new.permute(1, 0, 2, 3).contiguous().permute(1, 0, 2, 3)
    elif layout == "heads last":
        views = new.permute(0, 2, 1, 3).contiguous().permute(0, 2, 1, 3)
    elif layout == "unaligned":
        storage = torch.full((3, 10, 3, 27), torch.nan, dtype=new.dtype, device=target.device)
        views = storage[..., 1:25].copy_(new)
    else:  # no contiguous last dimension
        views = torch.zeros(3, 10, 3, 48, dtype=new.dtype, device=target.device)[..., ::2].copy_(new)
    assert not views[0].is_contiguous()
    caches = [new_cache(pattern, k, v, 2) for _ in range(2)]
    out = [step(target, x, cache) for x, cache in zip((views, new), caches)]
    assert torch.equal(*out) and out[0].is_contiguous()
    for name in ("image_k", "image_v"):
        assert torch.equal(*(getattr(cache.layer(0), name).nan_to_num(7.0) for cache in caches))


def what_is_written(target):
    """A step writes the new key and value to their slot, and nothing else."""
    pattern = P.row(5, (2, 4))
    q, k, v = make(target, pattern, 2, 3, 2, 24, torch.bfloat16 if "bfloat16" in target.dtypes else torch.float16)
    cache = new_cache(pattern, k, v, 2)
    layer = cache.layer(0)
    for storage in (layer.image_k, layer.image_v):
        storage.fill_(7.0)
    step(target, (x[:, :, 5] for x in (q, k, v)), cache)
    slot = int(layer.schedule[16])
    for storage, x in ((layer.image_k, k), (layer.image_v, v)):
        assert torch.equal(storage[:, :, slot], x[:, :, 5])
        storage[:, :, slot] = 7.0
        assert (storage == 7.0).all()


def repeated_step(target):
    pattern = P.row(4, (2, 3))
    q, k, v = make(target, pattern, 1, 6, 2, 16, torch.float32)
    expected = decode(target, pattern, q, k, v, 1)
    cache = new_cache(pattern, k, v, 1)
    for number in range(6):
        for _ in range(2):
            out = step(target, (x[:, :, 4 + number] for x in (q, k, v)), cache)
            assert torch.equal(out, expected[:, :, number])
        cache.advance()


def unseen_text(target):
    """Text keys outside the pattern may be NaN."""
    mask = torch.ones(22, 22, dtype=torch.bool).tril()
    mask[10:, 3:7] = False
    pattern = P.from_mask(mask, text_len=10)
    q, k, v = make(target, pattern, 1, 5, 2, 32, torch.float16)
    expected = decode(target, pattern, q, k, v, 1, steps=2)
    k[:, :, 3:7] = v[:, :, 3:7] = torch.nan
    assert torch.equal(decode(target, pattern, q, k, v, 1, steps=2), expected)


def text_lengths_are_refused(target):
    pattern = P.row(5, (2, 4))
    q, k, v = make(target, pattern, 2, 3, 2, 24, torch.float16)
    try:
        decode(target, pattern, q, k, v, 2, steps=1, lengths=[5, 2])
    except NotImplementedError as error:
        assert "does not support text_lengths; 'cpu' and 'reference' do" in str(error)
    else:
        raise AssertionError("text_lengths are not refused")


def overflow(target):
    """All but one of the first step's text scores overflow to -inf, which must give weights of 0."""
    pattern = P.row(70, (3, 4))
    q, k, v = make(target, pattern, 1, 2, 1, 32, torch.float32)
    q[..., 0], q[..., 1:] = 1e20, q[..., 1:] * 1e-3
    k[..., 0] = 0
    k[:, :, :64, 0] = -3e20
    out = decode(target, pattern, q, k, v, 1, steps=2)
    expected = decode(Target("reference", target.device), pattern, q, k, v, 1, steps=2)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
    assert out.isfinite().all()


def graph(target, dtype):
    """A captured graph of a step and its advance, replayed for the whole image."""
    pattern = P.column(12, (4, 5))
    q, k, v = make(target, pattern, 2, 9, 2, 64, DTYPES[dtype])
    expected = decode(target, pattern, q, k, v, 2)
    cache = new_cache(pattern, k, v, 2)
    new = [x[:, :, 12].clone() for x in (q, k, v)]

    def advance():
        out = step(target, new, cache)
        cache.advance()
        return [out]

    replay = captured(target, advance)
    cache.reset()
    for number in range(20):
        for to, source in zip(new, (q, k, v)):
            to.copy_(source[:, :, 12 + number])
        same(replay(), [expected[:, :, number]])


def one_graph(target):
    pattern = P.row(6, (2, 2))
    q, k, v = make(target, pattern, 1, 2, 1, 32, torch.float32)
    expected = decode(target, pattern, q, k, v, 1)
    cache = new_cache(pattern, k, v, 1)

    def advance(q, k, v):
        out = step(target, (q, k, v), cache)
        cache.advance()
        return out

    function = compiled(advance)
    with torch.inference_mode():
        for token in range(4):
            new = (x[:, :, 6 + token].contiguous() for x in (q, k, v))
            assert torch.equal(function(*new), expected[:, :, token])


def beyond_32_bits(target):
    """A cache of more than 2^31 elements: the last candidate has the same bits as alone."""
    need_memory(24)
    pattern, heads, dim = P.causal(8, (32, 32)), 16, 64
    candidates = 2**31 // (heads * dim * 1024) + 3
    new = torch.randn(3, candidates, heads, dim, dtype=torch.bfloat16, device=target.device)
    prefix = torch.randn(2, 1, heads, 8, dim, dtype=torch.bfloat16, device=target.device)

    def run(part):
        sizes = dict(prompts=1, candidates=part.stop - part.start, heads=heads, head_dim=dim)
        cache = dk.DecodeCache([pattern], **sizes, dtype=torch.bfloat16, device=target.device)
        cache.prefill(0, *prefix)
        for _ in range(3):
            out = step(target, (x[part] for x in new), cache)
            cache.advance()
        return out

    last = slice(candidates - 1, candidates)
    assert torch.equal(run(slice(0, candidates))[last], run(last))

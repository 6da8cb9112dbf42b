"""Every operation once on small shapes, forward and backward; compute-sanitizer runs it.

python -m gpu.small DEVICE BACKEND
"""

import sys

import torch

import dalle_kernels as dk

P = dk.AttentionPattern


def run(device: str, backend: str) -> None:
    for dtype, dim in ((torch.float32, 33), (torch.bfloat16, 64), (torch.float16, 128)):
        for pattern in (P.row(19, (5, 7)), P.column(40, (9, 5)), P.conv(7, (6, 6), kernel=3)):
            attention(pattern, dtype, dim, device, backend)
            decode(pattern, dtype, dim, device, backend)
        for hard in (False, True):
            logits = torch.randn(2, 70, 5, 4, device=device, dtype=dtype, requires_grad=True)
            y, kl = dk.gumbel_softmax(logits, 0.7, hard, dim=1, return_kl=True, backend=backend)
            (y.float().sum() + kl.sum()).backward()
        for top_k, top_p in ((None, None), (20, None), (None, 0.8), (50, 0.5)):
            dk.sample_tokens(torch.randn(3, 300, device=device).to(dtype), top_k=top_k, top_p=top_p, backend=backend)


def attention(pattern, dtype, dim, device, backend):
    q, k, v = torch.randn(3, 1, 2, pattern.seq_len, dim, device=device).to(dtype).requires_grad_().unbind(0)
    dk.sparse_attention(q, k, v, pattern, backend=backend).sum().backward()


def decode(pattern, dtype, dim, device, backend):
    sizes = dict(prompts=2, candidates=9, heads=2, head_dim=dim, dtype=dtype, device=device)
    with torch.inference_mode(), dk.use_backend(backend):
        cache = dk.DecodeCache([pattern], **sizes)
        cache.prefill(0, *torch.randn(2, 2, 2, pattern.text_len, dim, device=device).to(dtype))
        for _ in range(4):
            dk.decode_attention(*torch.randn(3, 18, 2, dim, device=device).to(dtype), cache, 0)
            cache.advance()


if __name__ == "__main__":
    run(*sys.argv[1:])
    if torch.cuda.is_available():
        torch.cuda.synchronize()

"""sparse_attention in bfloat16 by the CPU kernels of DALLE_KERNELS_CPU_ISA: `python attention.py FILE` saves outputs,
log-sum-exps and gradients of fixed problems, by name.
"""

import sys

import torch

import dalle_kernels as dk
from conformance import Target
from patterns_for_tests import every_pattern


def results():
    for head_dim, text_len, grid, unused in (64, 19, (9, 11), 0), (128, 7, (8, 8), 3), (40, 33, (5, 7), 1):
        for name, pattern in every_pattern(text_len, grid).items():
            shape = 2, 3, pattern.seq_len - unused, head_dim
            q, k, v = (torch.randn(shape, dtype=torch.bfloat16).requires_grad_() for _ in range(3))
            out, lse = dk.sparse_attention(q, k, v, pattern, return_lse=True, backend="cpu")
            gradients = torch.autograd.grad(out, (q, k, v), torch.randn_like(out))
            for label, x in zip(("out", "lse", "dq", "dk", "dv"), (out.detach(), lse.detach(), *gradients)):
                yield f"{name}, head dim {head_dim}: {label}", x


if __name__ == "__main__":
    torch.manual_seed(0)
    torch.set_num_threads(2)
    saved = {}
    for groups in None, 1:
        with Target("cpu").split_after(groups):
            saved.update({f"split after {groups}, {name}": x for name, x in results()})
    torch.save(saved, sys.argv[1])

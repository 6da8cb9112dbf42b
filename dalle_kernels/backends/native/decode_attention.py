"""Registers dalle_kernels::decode_attention (schema in csrc/ops/schemas.cpp): the fake kernel. There is no gradient."""

from __future__ import annotations

import torch

from ..sparse_attention import rows_contiguous

_op = torch.ops.dalle_kernels.decode_attention.default


def decode_attention(q, k, v, prefix_k, prefix_v, image_k, image_v, schedule, step, scale):
    """[P * C, H, D] of already checked tensors; writes the new key and value into image_k and image_v."""
    q, k, v = (rows_contiguous(x) for x in (q, k, v))
    return _op(q, k, v, prefix_k, prefix_v, image_k, image_v, schedule, step, scale)


@torch.library.register_fake("dalle_kernels::decode_attention")
def _(q, k, v, prefix_k, prefix_v, image_k, image_v, schedule, step, scale):
    return q.new_empty(q.shape)

"""Registers the fake kernels and autograd of dalle_kernels::sparse_attention (schema in csrc/ops/schemas.cpp)."""

from __future__ import annotations

import torch

from ..autograd import sparse_attention as shared
from .tiles import tiles

torch.library.register_fake("dalle_kernels::sparse_attention", shared.fake)
torch.library.register_fake("dalle_kernels::sparse_attention_backward", shared.fake_backward)
sparse_attention = shared.register_autograd(
    torch.ops.dalle_kernels.sparse_attention.default, torch.ops.dalle_kernels.sparse_attention_backward.default, tiles
)

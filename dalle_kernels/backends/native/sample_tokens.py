"""Registers the fake kernel of dalle_kernels::sample_tokens (schema in csrc/ops/schemas.cpp). It has no gradient."""

from __future__ import annotations

import torch

sample_tokens = torch.ops.dalle_kernels.sample_tokens.default


@torch.library.register_fake("dalle_kernels::sample_tokens")
def _(logits, seed, offset, temperature, top_k, top_p):
    return seed.new_empty(logits.shape[0])

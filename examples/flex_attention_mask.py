import torch

import dalle_kernels as dk


def window(b, h, q_idx, kv_idx):
    return (kv_idx <= q_idx) & (q_idx - kv_idx < 32)


pattern = dk.AttentionPattern.from_mask_mod(window, seq_len=256)  # was create_block_mask(window, 1, 1, 256, 256)
q, k, v = (torch.randn(1, 2, 256, 64, requires_grad=True) for _ in range(3))
loss = dk.sparse_attention(q, k, v, pattern).square().mean()  # was flex_attention(q, k, v, block_mask=...)
loss.backward()
print(f"loss {loss.item():.2f}")

import torch
from dalle_pytorch import DALLE, DiscreteVAE

import dalle_kernels as dk

vae = DiscreteVAE(image_size=64, num_layers=3, num_tokens=512, codebook_dim=64, hidden_dim=32)
types = ("full", "axial_row", "axial_col", "conv_like")
dalle = DALLE(dim=128, vae=vae, num_text_tokens=1000, text_seq_len=32, depth=4, heads=2, attn_types=types)
print(dk.patch(dalle))  # the only new line
loss = dalle(torch.randint(1, 1000, (2, 32)), torch.rand(2, 3, 64, 64), return_loss=True)
loss.backward()
print(f"loss {loss.item():.2f}")

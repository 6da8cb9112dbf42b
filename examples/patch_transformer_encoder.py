import torch
from torch import nn

import dalle_kernels as dk

layer = nn.TransformerEncoderLayer(64, 2, 128, dropout=0.0, batch_first=True)
model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
mask = ~dk.AttentionPattern.conv(text_len=16, grid=(8, 8), kernel=3).dense()  # or any causal mask of yours
print(dk.patch(model))  # the only new line
loss = model(torch.randn(4, 80, 64), mask=mask).square().mean()
loss.backward()
print(f"loss {loss.item():.2f}")

import torch
from torch.distributed import fsdp, init_process_group

import dalle_kernels as dk

init_process_group()  # start with: torchrun --nproc-per-node 2 examples/fsdp2_training.py
attention = dk.nn.SparseAttention(64, 2, dk.AttentionPattern.row(text_len=16, grid=(8, 8)))
model = fsdp.fully_shard(torch.nn.Sequential(torch.nn.Embedding(32, 64), attention, torch.nn.Linear(64, 32)))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
for tokens in [torch.randint(32, (4, 80), device=model[0].weight.device)] * 20:
    loss = torch.nn.functional.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
    optimizer.zero_grad(), loss.backward(), optimizer.step(), print(f"loss {loss.item():.2f}")

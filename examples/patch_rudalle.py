import torch
from rudalle import get_rudalle_model

import dalle_kernels as dk

model = get_rudalle_model("Malevich", pretrained=False, num_layers=4, hidden_size=128, num_attention_heads=2)
print(dk.patch(model))  # the only new line; training also needs attention_dropout_prob=0.0 above
tokens = torch.randint(8192, (1, 128 + 32 * 32))
loss, parts = model(tokens, torch.ones(1, 1, 1152, 1152).tril(), return_loss=True)
loss.backward()
print(f"loss {loss.item():.2f}")

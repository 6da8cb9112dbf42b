import lightning
from torch import nn, optim, randint

import dalle_kernels as dk


class LM(nn.Sequential, lightning.LightningModule):
    def training_step(self, tokens):
        return nn.functional.cross_entropy(self(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())

    def configure_optimizers(self):
        return optim.AdamW(self.parameters(), lr=1e-2)


model = LM(nn.Embedding(32, 64), dk.nn.SparseAttention(64, 2, dk.AttentionPattern.row(16, (8, 8))), nn.Linear(64, 32))
lightning.Trainer(max_epochs=1, precision="bf16-mixed").fit(model, randint(32, (4, 80)).repeat(20, 1, 1))

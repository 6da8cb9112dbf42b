"""Sampling 64 tokens of a vocabulary of 8192 against softmax, torch.topk and torch.multinomial."""

import pytest
import torch

import dalle_kernels as dk

ROWS, VOCAB = 64, 8192


def multinomial(logits, top_k):
    if top_k is not None:
        smallest = logits.topk(top_k).values[:, -1:]
        logits = logits.masked_fill(logits < smallest, float("-inf"))
    return torch.multinomial(logits.softmax(-1), 1)


@pytest.mark.parametrize("top_k", [None, 256], ids=["all", "top_k=256"])
def test_sample(versus, top_k):
    """64 rows of 8192 logits, float32."""
    logits = torch.randn(ROWS, VOCAB)
    with torch.inference_mode():
        versus(
            lambda: dk.sample_tokens(logits, top_k=top_k, seed=1, offset=2),
            {"softmax, multinomial": lambda: multinomial(logits, top_k)},
        )

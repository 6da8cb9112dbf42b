"""Whole models: training steps of a prior and a dVAE, and image generation, with our operations and with PyTorch's."""

import contextlib
import functools
from unittest import mock

import pytest
import torch
from common.baselines import PaddedCache, uniform_kl
from comparison import SETTING
from torch.nn.functional import gumbel_softmax
from torch.nn.functional import scaled_dot_product_attention as sdpa

from dalle.generation.sampler import generate_codes
from dalle.models.dvae import DiscreteVAE, DiscreteVAEConfig
from dalle.models.prior import Prior, PriorConfig
from dalle.training.optimizer import adamw

if SETTING.tiny:
    PRIOR = PriorConfig(8, 64, (4, 4), 32, layers=3, heads=2, head_dim=16, conv_kernel=3)
    DVAE = DiscreteVAEConfig(16, 64, (8, 8, 16), blocks=1, codebook_dim=8)
    IMAGES, CANDIDATES = 2, 2
else:
    PRIOR = PriorConfig(256, 1024, (32, 32), 1024, layers=4, heads=4)
    DVAE = DiscreteVAEConfig(128, 8192, (32, 64, 128), blocks=1)
    IMAGES, CANDIDATES = 2, 8


def with_sdpa(masked: bool):
    """Replacements on SDPA for the prior's operations: causal, or with the pattern as a boolean mask."""
    masks = {}

    def attention(q, k, v, pattern):
        if not masked:
            return sdpa(q, k, v, is_causal=True)
        if pattern not in masks:
            masks[pattern] = pattern.dense()
        mask = masks[pattern]
        return sdpa(q, k, v, attn_mask=mask[: q.shape[2], : q.shape[2]])

    return {
        "dalle_kernels.nn.sparse_attention": attention,
        "dalle_kernels.nn.decode_attention": lambda q, k, v, cache, layer: cache.attend(q, k, v, layer),
        "dalle_kernels.DecodeCache": functools.partial(PaddedCache, masked=masked),
    }


def plain_gumbel_softmax(logits, tau, dim, seed, return_kl):
    return gumbel_softmax(logits, tau, dim=dim), uniform_kl(logits, dim)


PRIORS = {"ours": {}, "causal SDPA": with_sdpa(False), "masked SDPA": with_sdpa(True)}
DVAES = {"ours": {}, "F.gumbel_softmax": {"dalle_kernels.gumbel_softmax": plain_gumbel_softmax}}


def using(replacements, function):
    """The function with our operations replaced, by the names under which the models look them up."""

    def run():
        with contextlib.ExitStack() as stack:
            for name, replacement in replacements.items():
                stack.enter_context(mock.patch(name, replacement))
            return function()

    return run


def against(versus, kernels, function, **options):
    runs = {name: using(replacements, function) for name, replacements in kernels.items()}
    versus(runs.pop("ours"), runs, **options)


def training_step(model, loss, precision):
    optimizer = adamw(model, betas=(0.9, 0.96), weight_decay=4.5e-2)

    def step():
        bfloat16 = torch.autocast("cpu", torch.bfloat16) if precision == "bfloat16" else contextlib.nullcontext()
        with bfloat16:
            value = loss()["loss"]
        optimizer.zero_grad()
        value.backward()
        optimizer.step()

    return step


def random_text(count):
    ids = torch.randint(PRIOR.text_vocab, (count, PRIOR.text_len - 1))
    return torch.cat([torch.full((count, 1), PRIOR.start_id), ids], 1)


precisions = pytest.mark.parametrize("precision", ["float32", "bfloat16"])


@precisions
def test_training_step_of_a_prior(versus, precision):
    """256 text and 32×32 image tokens, 4 layers (row, column, row, conv) of 4 heads of 64, batch 2: loss, gradients and
    AdamW; in bfloat16 by autocast.
    """
    model = Prior(PRIOR)
    text, codes = random_text(2), torch.randint(PRIOR.image_vocab, (2, PRIOR.image_len))
    step = training_step(model, lambda: model.loss(text, codes), precision)
    tokens = 2 * (PRIOR.text_len + PRIOR.image_len)
    against(versus, PRIORS, step, unit="tokens/s", count=tokens)


@pytest.mark.parametrize("candidates", [CANDIDATES])
def test_generation(versus, candidates):
    """Whole images, candidates of one prompt, by the same prior in float32; 3 rounds. SDPA attends to caches of the
    whole sequence.
    """
    model, text = Prior(PRIOR), random_text(1)
    generate = functools.partial(generate_codes, model, text, candidates=candidates, seeds=torch.arange(candidates))
    against(versus, PRIORS, generate, unit="images/s", count=candidates, rounds=3)


@pytest.mark.parametrize("precision", ["float32"])
def test_training_step_of_a_dvae(versus, precision):
    """128×128 pixels to 32×32 of 8192 codes, widths 32, 64, 128, batch 2: loss with its KL term, gradients, AdamW."""
    model = DiscreteVAE(DVAE).to(memory_format=torch.channels_last)
    images = torch.rand(IMAGES, 3, DVAE.image_size, DVAE.image_size)
    step = training_step(model, lambda: model.loss(images, tau=0.9, beta=6.6), precision)
    against(versus, DVAES, step, unit="images/s", count=IMAGES)

"""Models of other packages before and after dk.patch. Packages that are not installed are left out."""

import copy

import pytest
import torch
from comparison import SETTING
from packages_for_tests import peer
from torch import nn

import dalle_kernels as dk

TINY = SETTING.tiny
TEXT, SIDE = (6, 4) if TINY else (256, 32)
precisions = pytest.mark.parametrize("precision", ["float32", "bfloat16"])


def patched(model):
    """A patched copy that shares the parameters, so that one optimizer trains both."""
    model = copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})
    print(dk.patch(model))
    return model


def training_steps(model, loss, precision):
    """A training step of the patched and of the unpatched model: loss, gradients and AdamW."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)

    def step(model):
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"):
            value = loss(model)
        optimizer.zero_grad()
        value.float().backward()
        optimizer.step()

    other = patched(model)
    return lambda: step(other), {"unpatched": lambda: step(model)}


def dalle_pytorch():
    package = peer("dalle_pytorch", "dalle-pytorch")
    sizes = dict(num_tokens=8192, codebook_dim=1024, hidden_dim=64, num_resnet_blocks=1)
    vae = package.DiscreteVAE(image_size=8 * SIDE, num_layers=3, **sizes if not TINY else dict(num_tokens=32))
    return package.DALLE(
        dim=64 if TINY else 1024, vae=vae, num_text_tokens=10000, text_seq_len=TEXT, depth=4, heads=2 if TINY else 16,
        dim_head=64, attn_dropout=0.1, ff_dropout=0.1, attn_types=("full", "axial_row", "axial_col", "conv_like"),
    )  # fmt: skip


@precisions
def test_training_step_of_dalle_pytorch(versus, precision):
    """The configuration of its README (width 1024, 16 heads of 64, 256 + 32×32 tokens, 8192 codes) with 4 layers, one
    of each attention, batch 1; bfloat16 by autocast; 3 rounds.
    """
    model = dalle_pytorch()
    text, codes = torch.randint(1, 10000, (1, TEXT)), torch.randint(32, (1, SIDE**2))
    steps = training_steps(model, lambda model: model(text, codes, return_loss=True), precision)
    versus(*steps, unit="tokens/s", count=TEXT + SIDE**2, rounds=3)


@pytest.mark.parametrize("precision", ["float32"])
def test_generation_by_dalle_pytorch(versus, precision):
    """The last 4 tokens of an image by the same model with its own generate_images; 3 rounds."""
    model = dalle_pytorch().eval()
    text, image = torch.randint(1, 10000, (1, TEXT)), torch.rand(1, 3, 8 * SIDE, 8 * SIDE)

    def generate(model):
        model.generate_images(text, img=image, num_init_img_tokens=SIDE**2 - 4)

    other = patched(model)
    versus(lambda: generate(other), {"unpatched": lambda: generate(model)}, unit="tokens/s", count=4, rounds=3)


@precisions
def test_training_step_of_rudalle(versus, precision):
    """Malevich's shape (width 2048, 16 heads of 128, 128 + 32×32 tokens) with 4 layers, attention dropout 0, batch 1;
    bfloat16 by autocast; 3 rounds.
    """
    package, text_len = peer("rudalle.dalle.model", "rudalle"), TEXT // 2
    width, heads = (64, 2) if TINY else (2048, 16)
    model = package.DalleModel(
        "cpu", 4, 16384 + 128, width, heads, 0.1, 0.0, 0.1, text_len, SIDE, 8192, cogview_sandwich_layernorm=True,
        cogview_pb_relax=True,
    )  # fmt: skip
    n = text_len + SIDE**2
    ids, mask = torch.randint(1, 8192, (1, n)), torch.ones(1, 1, n, n).tril()
    steps = training_steps(model, lambda model: model(ids, mask, return_loss=True)[0], precision)
    versus(*steps, unit="tokens/s", count=n, rounds=3)


@pytest.mark.parametrize("mask", ["causal", "row", "conv"])
def test_training_step_of_a_transformer_encoder(versus, mask):
    """nn.TransformerEncoder, 4 layers of width 512 with 8 heads, 256 + 32×32 tokens, batch 2, float32."""
    width, heads = (32, 2) if TINY else (512, 8)
    layer = nn.TransformerEncoderLayer(width, heads, 4 * width, dropout=0.0, batch_first=True)
    model = nn.TransformerEncoder(layer, 4, enable_nested_tensor=False)
    pattern = getattr(dk.AttentionPattern, mask)(TEXT, (SIDE, SIDE))
    excluded, x = ~pattern.dense(), torch.randn(2, pattern.seq_len, width)

    def loss(model):
        return model(x, mask=excluded, is_causal=mask == "causal").square().mean()

    versus(*training_steps(model, loss, "float32"), unit="tokens/s", count=2 * pattern.seq_len)

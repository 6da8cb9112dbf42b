"""dk.patch on the packages themselves, where they are installed: `pip install --no-deps`, see packages_for_tests.py."""

import pytest
import torch
from packages_for_tests import peer
from patch_for_tests import assert_same_results, results

import dalle_kernels as dk

pytestmark = pytest.mark.slow

PRECISIONS = {"float64": (torch.float64, 1e-13), "float32": (torch.float32, 1e-5)}
precisions = pytest.mark.parametrize("precision", PRECISIONS)
TYPES = ("full", "axial_row", "axial_col", "conv_like")
DALLES = {
    "four types": {},
    "no token shift": dict(shift_tokens=False),
    "no rotary": dict(rotary_emb=False),
    "stable, sandwich": dict(stable=True, sandwich_norm=True),
    "reversible": dict(reversible=True),
    "head dim 24, dropout": dict(dim_head=24, attn_dropout=0.2, ff_dropout=0.1),
    "for inference": dict(optimize_for_inference=True, attn_types=("full", "axial_row", "axial_col")),
    "shared layers": dict(shared_attn_ids=(0, 1, 0, 1), attn_types=("axial_row", "axial_col")),
}


def dalle_pytorch(**options):
    package = peer("dalle_pytorch", "dalle-pytorch")
    vae = package.DiscreteVAE(image_size=32, num_layers=3, num_tokens=32, codebook_dim=16, hidden_dim=8)
    sizes = dict(dim=48, num_text_tokens=50, text_seq_len=6, depth=4, heads=2, dim_head=32, attn_types=TYPES)
    return package.DALLE(vae=vae, **sizes | options)


@precisions
@pytest.mark.parametrize("case", DALLES)
def test_dalle_pytorch(seed, case, precision):
    model = dalle_pytorch(**DALLES[case])
    text, image = torch.randint(1, 50, (2, 6)), torch.randint(32, (2, 16))
    calls = {
        "loss": lambda model: model(text, image, return_loss=True),
        "logits": lambda model: model(text, image).clamp(min=-1e3),  # of the other modality: -1e308
        "partial": lambda model: model(text, image[:, :5]).clamp(min=-1e3),
        "text": lambda model: model(text).clamp(min=-1e3),
    }
    for call in calls.values():
        replaced = assert_same_results(model, call, *PRECISIONS[precision])
    assert len(replaced) == (2 if "shared_attn_ids" in DALLES[case] else 4)
    sparse = [what for what in replaced.values() if "causal" not in what]
    assert sparse and all("7 + 4 x 4" in what for what in sparse)


def test_dalle_pytorch_generates_the_same_images(seed):
    model, text = dalle_pytorch().eval(), torch.randint(1, 50, (2, 6))

    def generate():
        torch.manual_seed(3)
        return model.generate_images(text.clone())

    expected = generate()
    with dk.patch(model):
        torch.testing.assert_close(generate(), expected)


@pytest.mark.parametrize("version", ["v2", "v3"])
@pytest.mark.parametrize("sandwich", [True, False])
@precisions
def test_rudalle(seed, version, sandwich, precision):
    package = peer("rudalle.dalle.model", "rudalle")
    model = package.DalleModel(
        "cpu", 7, 60, 48, 2, 0.1, 0.0, 0.1, 6, 12, 32, is_bool_mask=False, hf_version=version,
        cogview_sandwich_layernorm=sandwich, cogview_pb_relax=sandwich, mlp_activation="gelu",
    )  # fmt: skip  # the default is TorchScript, which changes its bits after the first calls
    ids = torch.cat([torch.randint(50, (2, 6)), torch.randint(32, (2, 144))], 1)

    def mask(model):
        return torch.ones(2, 1, 150, 150, dtype=model.to_logits[1].weight.dtype).tril()

    calls = {
        "loss": lambda model: model(ids, mask(model), return_loss=True)[0],
        "logits": lambda model: model(ids, mask(model))[0],
        "partial": lambda model: model(ids[:, :17], mask(model))[0],
    }
    for name, call in calls.items():
        tolerance = 1e-5 if name == "loss" else PRECISIONS[precision][1]  # it is computed in float32
        replaced = assert_same_results(model, call, PRECISIONS[precision][0], tolerance)
    names = [what.split(",")[1].strip() for what in replaced.values()]
    conv = "conv-torus" if version == "v2" else "conv-clip"
    assert names == ["row", "column", "row", "row", "row", "column", conv]


def test_rudalle_with_its_own_dropout(seed):
    """0.1: it generates as it did, also with its cache, and training is refused."""
    package = peer("rudalle.dalle.model", "rudalle")
    model = package.DalleModel("cpu", 3, 60, 48, 2, 0.1, 0.1, 0.1, 6, 5, 32).eval()
    ids, mask = torch.randint(32, (2, 31)), torch.ones(2, 1, 31, 31).tril()
    expected, cache = model(ids[:, :20], mask, use_cache=True)
    expected_next, _ = model(ids[:, :21], mask, use_cache=True, cache=cache)
    with dk.patch(model):
        torch.testing.assert_close(model(ids[:, :20], mask)[0], expected)
        _, cache = model(ids[:, :20], mask, use_cache=True)
        torch.testing.assert_close(model(ids[:, :21], mask, use_cache=True, cache=cache)[0], expected_next)
        with pytest.raises(ValueError, match=r"attention dropout of transformer\.layers\.0\.attention is 0\.1"):
            model.train()(ids, mask)


@precisions
def test_mingpt(seed, precision):
    package = peer("taming.modules.transformer.mingpt", "taming-transformers")
    model = package.GPT(40, 30, n_layer=2, n_head=3, n_embd=48, embd_pdrop=0.1, resid_pdrop=0.1)
    tokens = torch.randint(40, (2, 30))
    for n in (30, 17):
        assert_same_results(model, lambda model, n=n: model(tokens[:, :n])[0], *PRECISIONS[precision])


def test_gumbel_softmax_of_dalle_pytorch(seed):
    package, images = peer("dalle_pytorch", "dalle-pytorch"), torch.rand(2, 3, 32, 32)
    for reinmax in (False, True):
        vae = package.DiscreteVAE(
            image_size=32, num_layers=3, num_tokens=32, codebook_dim=16, hidden_dim=8, straight_through=True,
            reinmax=reinmax, kl_div_loss_weight=0.1,
        )  # fmt: skip
        assert_noise_alone_differs(vae, lambda vae: vae(images, return_loss=True))


def test_gumbel_softmax_of_rudalle(seed):
    package, z = peer("rudalle.vae.model", "rudalle"), torch.randn(2, 16, 4, 4)
    assert_noise_alone_differs(package.GumbelQuantize(16, 8, 32), lambda quantize: quantize(z)[0])


def assert_noise_alone_differs(model, call):
    expected, expected_grads = results(model, call)
    with dk.patch(model, gumbel=True) as patch:
        out, grads = results(model, call)
        assert torch.equal(results(model, call)[0], out)
    assert list(patch.replaced.values()) == ["gumbel_softmax"]
    assert out.shape == expected.shape and not torch.equal(out, expected)
    assert grads.keys() == expected_grads.keys() and all(grad.isfinite().all() for grad in grads.values())
    assert torch.equal(results(model, call)[0], expected)

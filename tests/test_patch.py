"""dk.patch on models with the structure of DALLE-pytorch, ruDALL-E, minGPT and torch.nn."""

import copy
import pickle
import re

import pytest
import torch
from patch_for_tests import assert_near, assert_same_results, results
from peer_models_for_tests import DALLE, GPT, Attention, DiscreteVAE, Encoder, RuDALLE, fused, separate
from torch import nn

import dalle_kernels as dk
from patterns_for_tests import random_mask

P = dk.AttentionPattern


def added(allowed):
    """The mask as numbers that are added to the scores."""
    return torch.zeros(allowed.shape).masked_fill(~allowed, -torch.inf)


DALLE_PATTERNS = ["causal, 0 + 1 x 22", "axial_row, 7 + 4 x 4", "column, 7 + 4 x 4", "corner_conv, 7 + 4 x 4"]
ROW, COLUMN = "row, 5 + 4 x 4", "column, 5 + 4 x 4"
CALL = "for the causal mask of a call"
# a model, its tokens, and the beginning of what replaces each attention
CASES = {
    "dalle-pytorch": (DALLE, 22, DALLE_PATTERNS),
    "dalle-pytorch, partial": (DALLE, 13, DALLE_PATTERNS),
    "dalle-pytorch, text": (DALLE, 4, DALLE_PATTERNS),
    "dalle-pytorch, no rotary": (lambda: DALLE(rotary=False), 22, DALLE_PATTERNS),
    "dalle-pytorch, dilated, static": (
        lambda: DALLE(("dilated", "static")), 22, ["corner_conv, 7 + 4 x 4 tokens, dilation=2", "column, 7 + 4 x 4"]
    ),
    "dalle-pytorch, output dropout": (lambda: DALLE(dropout=0.3), 22, DALLE_PATTERNS),
    "rudalle v3": (RuDALLE, 21, [ROW, COLUMN, "conv-clip, 5 + 4 x 4"]),
    "rudalle v2": (lambda: RuDALLE(version="v2", side=16), 261, ["row", "column", "conv-torus, 5 + 16 x 16"]),
    "rudalle, another kernel": (lambda: RuDALLE(kernel=3), 21, [ROW, COLUMN, "mask, 0 + 1 x 21"]),
    "rudalle, plain softmax": (lambda: RuDALLE(relaxed=False), 14, [ROW, COLUMN, "conv-clip"]),
    "rudalle, output dropout": (lambda: RuDALLE(dropouts=(0.0, 0.3)), 21, [ROW, COLUMN, "conv-clip"]),
    "minGPT, 2020": (GPT, 22, ["causal, 0 + 1 x 22"] * 2),
    "minGPT": (lambda: GPT(fused, resid_pdrop=0.3), 17, ["causal, 0 + 1 x 22"] * 2),
    "encoder": (Encoder, 22, [CALL] * 2),
    "encoder, no hint": (lambda: Encoder("read"), 22, [CALL] * 2),
    "encoder, sequence first": (lambda: Encoder(batch_first=False), 22, [CALL] * 2),
    "encoder, norm first": (lambda: Encoder(norm_first=True), 22, [CALL] * 2),
    "encoder, other dropout": (lambda: Encoder(dropout=0.3, attention_dropout=0.0), 22, [CALL] * 2),
    "encoder, bool mask": (lambda: Encoder(~random_mask(22)), 22, [CALL] * 2),
    "encoder, float mask": (lambda: Encoder(added(random_mask(22))), 22, [CALL] * 2),
}  # fmt: skip
cases = pytest.mark.parametrize("case", CASES)
PRECISIONS = {"float64": (torch.float64, 1e-13), "float32": (torch.float32, 1e-5)}


def example(case):
    make, n, _ = CASES[case]
    return make(), torch.randint(40, (2, n))


@pytest.mark.parametrize("precision", PRECISIONS)
@cases
def test_outputs_and_gradients_stay_as_they_were(seed, case, precision):
    """float64 on reference, float32 on the CPU kernels."""
    model, tokens = example(case)
    replaced = assert_same_results(model, lambda model: model(tokens), *PRECISIONS[precision])
    expected = CASES[case][2]
    assert len(replaced) == len(expected)
    for what, begin in zip(replaced.values(), expected, strict=True):
        assert what.startswith(f"sparse_attention, {begin}")


def test_the_kernel_is_called(seed, monkeypatch):
    """Once per layer, with the pattern that patch names."""
    called = []
    attention = dk.sparse_attention

    def sparse_attention(q, k, v, pattern, **options):
        called.append(pattern)
        return attention(q, k, v, pattern, **options)

    monkeypatch.setattr("dalle_kernels.patch_targets.sparse_attention", sparse_attention)
    for case in ("dalle-pytorch", "encoder", "encoder, bool mask"):
        model, tokens = example(case)
        with dk.patch(model):
            model(tokens)
    T, grid = 7, (4, 4)  # the start token makes the text one longer
    patterns = [P.causal(0, (1, 22)), P.axial_row(T, grid), P.column(T, grid), P.corner_conv(T, grid, 3)]
    assert called == [*patterns, *[P.causal(0, (1, 22))] * 2, *[P.from_mask(~model.mask)] * 2]


def test_the_encoder_layers_fused_inference_is_replaced_too(seed):
    model, tokens = Encoder().eval(), torch.randint(40, (2, 22))
    with torch.no_grad():
        out = model(tokens)
        for layer in model.encoder.layers:
            layer.self_attn.in_proj_weight.requires_grad_(False)
        with dk.patch(model) as patch, pytest.MonkeyPatch.context() as monkeypatch:
            monkeypatch.setattr(torch, "_transformer_encoder_layer_fwd", None)
            assert_near(model(tokens), out, 1e-5)
    assert patch.kept == {}


def test_multihead_attention(seed):
    """By itself; cross attention and calls that want the weights stay as they are."""
    attention, x = nn.MultiheadAttention(24, 2, batch_first=True), torch.randn(2, 9, 24)
    options = dict(attn_mask=~random_mask(9), need_weights=False)
    expected, weights = attention(x, x, x, attn_mask=options["attn_mask"])
    with dk.patch(attention) as patch:
        assert_near(attention(x, x, x, **options)[0], expected, 1e-5)
        assert patch.replaced == {"MultiheadAttention": f"sparse_attention, {CALL}"} and patch.kept == {}
        assert torch.equal(attention(x, x, x, attn_mask=options["attn_mask"])[1], weights)
        assert "need_weights" in patch.kept["MultiheadAttention"]
        attention(x, x + 1, x + 1, **options)
        assert "cross" in patch.kept["MultiheadAttention"]


NOT_PATTERNS = {
    "bidirectional": (None, "have no mask"),
    "keys after the query": (torch.ones(22, 22, dtype=torch.bool).triu(2), "not causal"),
    "a bias": (torch.linspace(-1, 0, 22 * 22).reshape(22, 22), "other numbers than 0 and -inf"),
}


@pytest.mark.parametrize("case", NOT_PATTERNS)
def test_masks_that_are_no_pattern_keep_the_modules_forward(seed, case):
    mask, reason = NOT_PATTERNS[case]
    model, tokens = Encoder(mask), torch.randint(40, (2, 22))
    out = model(tokens)
    with dk.patch(model) as patch:
        assert torch.equal(model(tokens), out)
    assert patch.kept.keys() == patch.replaced.keys() == {"encoder.layers.0", "encoder.layers.1"}
    assert all(reason in why for why in patch.kept.values())


def test_a_mask_changed_in_place_is_read_again(seed):
    model, tokens = Encoder(added(random_mask(22))), torch.randint(40, (2, 22))
    with dk.patch(model):
        first = model(tokens)
        model.mask[1:, 0] = -torch.inf
        second = model(tokens)
    assert not torch.equal(first, second)
    assert_near(second, model(tokens), 1e-5)


def test_caches_keep_the_modules_forward(seed):
    tokens, cache = torch.randint(40, (2, 22)), {}
    model = DALLE(("full",))
    with dk.patch(model) as patch:
        model(tokens, cache=cache)
    assert cache == {"calls": 1} and "cache" in patch.kept["attentions.0"]
    model = RuDALLE()
    expected = model(tokens[:, :21], use_cache=True)
    with dk.patch(model) as patch:
        assert torch.equal(model(tokens[:, :21], use_cache=True), expected)
    assert len(patch.kept) == 3


def padding(model, excluded):
    """The mask of a call to the model that excludes a key if `excluded`."""
    if isinstance(model, DALLE):
        return dict(mask=(torch.arange(22) != 3).expand(2, 22) | (not excluded))
    if isinstance(model, RuDALLE):
        mask = torch.ones(2, 1, 21, 21).tril()
        mask[1, :, 4:, 3] -= int(excluded)
        return dict(attention_mask=mask)
    return dict(src_key_padding_mask=torch.zeros(2, 22).index_fill(1, torch.tensor(3), -torch.inf if excluded else 0))


@pytest.mark.parametrize("case", ["dalle-pytorch", "rudalle v3", "encoder", "encoder, no hint"])
def test_padding_masks_are_refused_if_they_matter(seed, case):
    model, tokens = example(case)
    expected = model(tokens)
    with dk.patch(model) as patch:
        assert_near(model(tokens, **padding(model, False)), expected, 1e-5)
        [first, *_] = patch.replaced
        with pytest.raises(ValueError, match=f"^{re.escape(first)}: the mask of this call excludes keys .* undo"):
            model(tokens, **padding(model, True))
    assert not torch.equal(model(tokens, **padding(model, True)), expected)


DROPPING = {
    "encoder": lambda: Encoder(dropout=0.1),
    "minGPT, 2020": lambda: GPT(separate, attn_pdrop=0.1),
    "minGPT": lambda: GPT(fused, attn_pdrop=0.1),
    "rudalle": lambda: RuDALLE(dropouts=(0.1, 0.0)),
}


@pytest.mark.parametrize("case", DROPPING)
def test_attention_dropout_is_refused_by_name(seed, case):
    model, tokens = DROPPING[case](), torch.randint(40, (2, 21))
    with pytest.raises(ValueError, match=r"the attention dropout of \w+.*0.* \(and of \d more modules\) is 0\.1"):
        dk.patch(model)
    assert not any("forward" in vars(module) for module in model.modules())
    model.eval()
    expected = model(tokens)
    with dk.patch(model) as patch:
        assert_near(model(tokens), expected, 1e-5)
        model.train()
        [first, *_] = patch.replaced
        with pytest.raises(ValueError, match=f"the attention dropout of {re.escape(first)} is 0.1"):
            model(tokens)


def test_what_is_kept_has_its_reason():
    model = nn.ModuleList([DALLE(("full", "bidirectional")), GPT(unmasked=4), GPT(pair=True), nn.Linear(2, 2)])
    model.extend([nn.MultiheadAttention(24, 2, add_zero_attn=True), nn.MultiheadAttention(24, 2, kdim=8)])
    model.append(GPT(fused, scale=2.0))
    patch = dk.patch(model)
    assert list(patch.replaced) == ["0.attentions.0"]
    reasons = {
        "0.attentions.1": "bidirectional",
        "1.blocks.0": "not causal: 6 pairs",
        "2.blocks.0": "more than a tensor",
        "6.blocks.0": "something else",
        "4": "adds a key",
        "5": "widths of their own",
    }
    assert patch.kept.keys() == {*reasons, "1.blocks.1", "2.blocks.1", "6.blocks.1"}
    for name, reason in reasons.items():
        assert reason in patch.kept[name]
    lines = str(patch).splitlines()
    assert lines[0] == "replaced 0.attentions.0: sparse_attention, causal, 0 + 1 x 22 tokens" and len(lines) == 10


def other_attention():
    """A class of the same name with other attributes, and one with another signature."""
    nameless = type("Attention", (nn.Module,), {"forward": lambda self, x: x})()
    longer = type("Attention", (Attention,), {"forward": lambda self, x, context=None, mask=None: x})(24, 22, 2, 12)
    return nn.ModuleList([nameless, longer])


def test_classes_that_share_a_name_are_kept():
    with pytest.raises(ValueError, match=r"0 is kept because it is another Attention .* no 'to_qkv' \(1 more .* too\)"):
        dk.patch(other_attention())
    with pytest.raises(ValueError, match="its forward takes other arguments: x, context, mask"):
        dk.patch(other_attention()[1])
    inherited = type("Tuned", (Attention,), {})(24, 22, 2, 12)
    assert list(dk.patch(inherited).replaced) == ["Tuned"]


def test_torch_layers_that_others_have_changed_are_kept(seed):
    """Of a layer with a forward or attention of its own, patch replaces at most the nn.MultiheadAttention in it."""
    layer = nn.TransformerEncoderLayer(24, 2, 48, 0.0, batch_first=True)
    namesake = type("TransformerEncoderLayer", (nn.TransformerEncoderLayer,), {"forward": named_forward})
    sa_block = {"_sa_block": lambda self, *arguments, **options: -layer._sa_block(*arguments, **options)}
    for cls in (namesake, type("Negative", (nn.TransformerEncoderLayer,), sa_block)):
        model = cls(24, 2, 48, 0.0, batch_first=True)
        patch = dk.patch(model)
        assert list(patch.replaced) == ["self_attn"]
        assert patch.kept == {cls.__name__: "it is another TransformerEncoderLayer than that of torch.nn"}
    layer.self_attn.forward = None
    with pytest.raises(ValueError, match="forward has been replaced already"):
        dk.patch(layer)


def named_forward(self, src, src_mask=None, src_key_padding_mask=None, is_causal=False):
    return src


def test_wrong_arguments():
    with pytest.raises(TypeError, match=r"model must be an nn\.Module; got int"):
        dk.patch(3)
    with pytest.raises(ValueError, match=r"nothing to replace in Linear: no attention that patch knows; call dk\."):
        dk.patch(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="dropout='drop' is not 'refuse'"):
        dk.patch(GPT(), dropout="drop")


@pytest.mark.parametrize("make", [GPT, RuDALLE, DALLE, Encoder, nn.Transformer])
def test_a_model_is_patched_once(make):
    model = make().eval()
    patch = dk.patch(model)
    with pytest.raises(ValueError, match=r"is kept because its forward has been replaced already"):
        dk.patch(model)
    patch.undo()
    patch.undo()
    dk.patch(model)


def test_undo_names_a_forward_that_was_replaced_later():
    model = GPT()
    patch = dk.patch(model)
    ours, model.blocks[1].forward = model.blocks[1].forward, lambda x: x
    with pytest.raises(RuntimeError, match=r"the forward of blocks\.1 has been replaced after the patch"):
        patch.undo()
    model.blocks[1].forward = ours
    patch.undo()
    assert not any("forward" in vars(module) for module in model.modules())


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_are_patched_and_independent(seed, copied):
    model, tokens = DALLE(), torch.randint(40, (2, 22))
    with dk.patch(model):
        out, _ = results(model, lambda model: model(tokens))
        other = copied(model)
    assert [site.module is module for module in other.attentions for site in [vars(module)["forward"]]] == [True] * 4
    assert torch.equal(results(other, lambda model: model(tokens))[0], out)
    with torch.no_grad():
        other.attentions[0].to_qkv.weight.zero_()
    assert not torch.equal(other(tokens), out)


@pytest.mark.slow
@pytest.mark.parametrize("case", ["dalle-pytorch", "minGPT, 2020", "encoder"])
def test_compiles_to_one_graph(seed, case):
    model, tokens = example(case)
    torch.compiler.reset()
    with dk.patch(model):
        expected, grads = results(model, lambda model: model(tokens))
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        out, compiled_grads = results(model, lambda _: compiled(tokens))
    assert_near(out, expected, 1e-6)
    for name, grad in grads.items():
        assert_near(compiled_grads[name], grad, 1e-5)


@pytest.mark.parametrize("hard", [False, True])
def test_gumbel_softmax(seed, hard):
    """The draws of dk.gumbel_softmax for the same state of the generator, and those of torch.nn after undo()."""
    model, images = nn.ModuleDict({"vae": DiscreteVAE(hard), "gpt": GPT()}), torch.rand(2, 3, 16, 16)

    def run(model):
        torch.manual_seed(3)
        return model["vae"](images)

    expected, _ = results(model, run)
    assert "vae" not in dk.patch(copy.deepcopy(model)).replaced
    with dk.patch(model, gumbel=True) as patch:
        out, grads = results(model, run)
    assert patch.replaced["vae"] == "gumbel_softmax" and len(patch.replaced) == 3
    assert torch.equal(run(model), expected) and not torch.equal(out, expected)
    torch.manual_seed(3)
    vae = model["vae"]
    soft = dk.gumbel_softmax(vae.encoder(images), 0.9, hard, dim=1)
    assert torch.equal(vae.decoder(torch.einsum("bnhw,nd->bdhw", soft, vae.codebook.weight)), out)
    assert grads["vae.encoder.weight"].abs().max() > 0


def test_a_model_without_gumbel_softmax_is_named():
    with pytest.raises(ValueError, match=r"no module of GPT calls F\.gumbel_softmax"):
        dk.patch(GPT(), gumbel=True)

"""The prior: published sizes and schedule, loss against loops, dependencies, and generation against full re-runs."""

import copy
import math

import cuda_graph_for_tests
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

import dalle_kernels as dk
from dalle import Prior, PriorConfig, UserError
from dalle.generation.sampler import generate_codes, sequence_bytes
from dalle.models.blocks import gelu
from dalle_kernels import backends
from dalle_kernels.backends.plans import schedule_tensor
from statistics_for_tests import REJECT, frequencies_p, normal_std_p

SMALL = PriorConfig(5, 11, (3, 4), 9, layers=4, heads=2, head_dim=8, conv_kernel=3)


def make(config=SMALL, scale=8.0):
    """A prior whose weights are large enough for its predictions to differ."""
    model = Prior(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * (0.02 * scale))
    return model


def batch(config, size):
    captions = [torch.randint(config.text_vocab, (i % config.text_len,)).tolist() for i in range(size)]
    return captions, torch.randint(config.image_vocab, (size, config.image_len))


def test_exports_with_a_dynamic_batch(seed):
    prior = make()
    text, codes = torch.randint(11, (2, 5)), torch.randint(9, (2, 12))
    size = torch.export.Dim("batch", min=1, max=64)
    exported = torch.export.export(prior, (text, codes), dynamic_shapes=({0: size}, {0: size}))
    more = torch.randint(11, (7, 5)), torch.randint(9, (7, 12))
    torch.testing.assert_close(exported.module()(*more), prior(*more), rtol=0, atol=0)


@pytest.mark.parametrize(("name", "billions"), [("dalle-2.8b", 2.83), ("dalle-5.6b", 5.55), ("dalle-12b", 12.09)])
def test_published_sizes(name, billions):
    with torch.device("meta"):
        model = Prior(PriorConfig.preset(name))
    d, layers = model.config.width, 64
    outside = ("text_embedding", "text_position", "image_embedding", "row_embedding", "column_embedding")
    inner = sum(
        p.numel() for n, p in model.named_parameters() if not n.startswith((*outside, "text_head", "image_head"))
    )
    matrices = 12 * d * d * layers  # 3 d^2 of q, k, v, d^2 of the output, 8 d^2 of the MLP
    biases = (3 * d + d + 4 * d + d) * layers
    norms = 2 * 2 * d * layers + 2 * d
    assert inner == matrices + biases + norms
    assert round(matrices / 1e9, 2) == billions


def test_published_width():
    config = PriorConfig.preset("dalle-12b")
    assert (config.width, config.text_len, config.image_len, config.image_vocab) == (3968, 256, 1024, 8192)


def test_published_schedule():
    row = dk.AttentionPattern.row(text_len=256, grid=(32, 32))
    column = dk.AttentionPattern.column(text_len=256, grid=(32, 32))
    conv = dk.AttentionPattern.conv(text_len=256, grid=(32, 32), kernel=11, edge="wrap")
    schedule = PriorConfig.preset("dalle-12b").schedule()
    assert schedule[:8] == [row, column, row, row, row, column, row, row]
    assert [schedule.count(pattern) for pattern in (row, column, conv)] == [47, 16, 1]
    assert schedule[-1] == conv and len(schedule) == 64


def test_gelu():
    x = torch.linspace(-9, 9, 101, dtype=torch.float64)
    torch.testing.assert_close(gelu(x), x / (1 + torch.exp(-1.702 * x)))


def test_initialisation(seed):
    model = Prior(PriorConfig(8, 300, (4, 4), 300, layers=8, heads=4, head_dim=32))
    for layer in model.layers:
        for linear, std in (
            (layer.attention.qkv, 0.02),
            (layer.mlp_in, 0.02),
            (layer.attention.out, 0.005),
            (layer.mlp_out, 0.005),
        ):
            assert normal_std_p(linear.weight, std) > REJECT
            assert not linear.bias.any()


def test_pack_text():
    model = Prior(SMALL)
    text = model.pack_text([[3, 4], [], [1, 2, 0, 10]])
    assert text.tolist() == [[11, 3, 4, 15, 16], [11, 13, 14, 15, 16], [11, 1, 2, 0, 10]]
    with pytest.raises(UserError, match="5 tokens and the model reads at most 4"):
        model.pack_text([[1] * 5])
    assert model.pack_text([[1] * 5], truncate=True).tolist() == [[11, 1, 1, 1, 1]]
    with pytest.raises(UserError, match="text id 11"):
        model.pack_text([[11]])


def test_loss_by_hand(seed):
    model = make()
    captions, codes = batch(SMALL, 5)
    text_logits, image_logits = model(model.pack_text(captions), codes)
    text_logits, image_logits = text_logits.double().log_softmax(-1), image_logits.double().log_softmax(-1)
    text, image = [], []
    for i, caption in enumerate(captions):
        targets = [*caption, SMALL.start_id][: SMALL.text_len - 1]  # the end of text, where there is room for it
        text += [-text_logits[i, p, target].item() for p, target in enumerate(targets)]
        image += [-image_logits[i, p, code].item() for p, code in enumerate(codes[i].tolist())]
    text, image = sum(text) / len(text), sum(image) / len(image)
    found = model.loss(model.pack_text(captions), codes)
    assert found["text"].item() == pytest.approx(text, rel=1e-5)
    assert found["image"].item() == pytest.approx(image, rel=1e-5)
    assert found["loss"].item() == pytest.approx(text / 8 + image * 7 / 8, rel=1e-5)


def test_every_weight_that_is_used_gets_a_gradient(seed):
    model = make(scale=2)
    captions, codes = batch(SMALL, 16)
    model.loss(model.pack_text(captions), codes)["loss"].backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())


def influence(model, captions, codes, change):
    """Which logits depend on what `change` alters: text bool [T - 1] and image bool [rows * columns]."""
    text = model.pack_text(captions)
    other_text, other_codes = text.clone(), codes.clone()
    change(other_text, other_codes)
    with torch.no_grad():
        before, after = model(text, codes), model(other_text, other_codes)
    return [(a != b).any(-1).any(0) for a, b in zip(before, after, strict=True)]


def test_a_code_moves_only_later_predictions(seed):
    model = make()
    captions, codes = batch(SMALL, 2)
    for i in range(SMALL.image_len):

        def change(text, image, i=i):
            image[:, i] = (image[:, i] + 1) % SMALL.image_vocab

        text, image = influence(model, captions, codes, change)
        assert not text.any() and not image[: i + 1].any()
        if i + 1 < SMALL.image_len:
            assert image[i + 1]


def test_a_word_moves_later_text_and_the_whole_image(seed):
    model = make()
    captions, codes = [[1, 2, 3]], torch.randint(SMALL.image_vocab, (1, SMALL.image_len))

    def change(text, image):
        text[:, 2] = 7

    text, image = influence(model, captions, codes, change)
    assert text.tolist() == [False, False, True, True] and image.all()


def test_padding_differs_by_position_and_is_attended_to(seed):
    model = make()
    codes = torch.randint(SMALL.image_vocab, (1, SMALL.image_len))

    def change(text, image):
        text[:, 4] = text[:, 3]  # another position's padding token

    text, image = influence(model, [[1]], codes, change)
    assert not text.any() and image.all()


def generate_uncached(
    model, text, candidates, seeds, given=None, resample=None, guidance=1, negative=None, min_p=None, **how
):
    """Generation without a cache: the whole sequence runs again for every code, with guidance in two plain runs."""
    avoided = model.pack_text([[]] * len(text)) if negative is None else negative
    text, avoided = (x.repeat_interleave(candidates, 0) for x in (text, avoided))
    grid = model.config.grid
    given = None if given is None else given.repeat_interleave(candidates, 0)
    codes = text.new_empty(len(text), 0)
    with torch.no_grad():
        for i in range(model.config.image_len):
            row, column = divmod(i, grid[1])
            if resample is None or resample[row, column]:
                logits = model(text, codes)[1][:, i]
                if guidance != 1:
                    logits = torch.lerp(model(avoided, codes)[1][:, i], logits, guidance)
                if min_p is not None:
                    probabilities = (logits / how.get("temperature", 1)).softmax(-1)
                    logits[probabilities < min_p * probabilities.amax(-1, keepdim=True)] = -torch.inf
                code = dk.sample_tokens(logits, seed=seeds, offset=i, **how)
            else:
                code = given[:, row, column]
            codes = torch.cat([codes, code[:, None]], 1)
    return codes.unflatten(1, grid)


@settings(max_examples=8)
@given(
    grid=st.tuples(st.integers(1, 5), st.integers(1, 5)).filter(lambda g: g[0] * g[1] > 1),
    text_len=st.integers(2, 6),
    layers=st.integers(1, 6),
    prompts=st.integers(1, 3),
    candidates=st.integers(1, 3),
    number=st.integers(0, 2**31),
)
def test_generation_equals_full_runs(grid, text_len, layers, prompts, candidates, number):
    torch.manual_seed(number)
    config = PriorConfig(text_len, 11, grid, 9, layers=layers, heads=2, head_dim=8, conv_kernel=3)
    model = make(config)
    captions, codes = batch(config, prompts)
    text, seeds = model.pack_text(captions), torch.randint(2**62, (prompts * candidates,))
    given = codes.unflatten(1, grid)
    corner, scattered = torch.zeros(grid, dtype=torch.bool), torch.rand(grid) < 0.5
    corner[number % grid[0] :, number % grid[1] :] = True
    scattered[-1, -1] = True
    for part in ({}, dict(given=given, resample=corner), dict(given=given, resample=scattered)):
        for how in (
            dict(temperature=1.0), dict(temperature=0.7, top_k=3), dict(top_k=1), dict(top_p=0.8),
            dict(min_p=0.9, temperature=0.5), dict(guidance=2.5), dict(guidance=0.5, negative=text.flip(0), top_k=4),
        ):  # fmt: skip
            found = generate_codes(model, text, candidates=candidates, seeds=seeds, **part, **how)
            assert torch.equal(found, generate_uncached(model, text, candidates, seeds, **part, **how)), (part, how)


def test_guidance_of_one_is_none_and_more_changes_the_images(seed):
    model = make()
    with torch.no_grad():  # an untrained model hardly depends on the text
        for weight in model.parameters():
            weight.mul_(8 if weight.ndim > 1 else 1)
    text, seeds = model.pack_text([[1, 2], [3]]), torch.arange(64)
    plain = generate_codes(model, text, candidates=32, seeds=seeds)
    negative = text.flip(0)
    assert torch.equal(generate_codes(model, text, candidates=32, seeds=seeds, guidance=1.0, negative=negative), plain)
    guided = generate_codes(model, text, candidates=32, seeds=seeds, guidance=3.0)
    assert not torch.equal(guided, plain)
    away = generate_codes(model, text, candidates=32, seeds=seeds, guidance=3.0, negative=negative)
    assert not torch.equal(away, guided)


def test_what_is_not_resampled_stays_and_changes_what_follows(seed):
    """One untrained model in about a hundred ignores the given codes, so up to four are tried."""
    resample = torch.zeros(3, 4, dtype=torch.bool)
    resample[1:, 2:] = True
    changed = 0
    for _ in range(4):
        model = make()
        with torch.no_grad():  # an untrained model hardly depends on the given codes
            for weight in model.parameters():
                weight.mul_(8 if weight.ndim > 1 else 1)
        captions, codes = batch(SMALL, 3)
        text, seeds = model.pack_text(captions), torch.randint(2**62, (96,))
        generated = generate_codes(model, text, candidates=32, seeds=seeds, given=codes, resample=resample)
        assert torch.equal(generated[:, ~resample], codes.unflatten(1, (3, 4))[:, ~resample].repeat_interleave(32, 0))
        codes[:, 8:10] = (codes[:, 8:10] + 1) % SMALL.image_vocab  # below the first two resampled, left of the last two
        again = generate_codes(model, text, candidates=32, seeds=seeds, given=codes, resample=resample)
        assert torch.equal(again[:, 1, 2:], generated[:, 1, 2:])
        changed += (again[:, 2, 2:] != generated[:, 2, 2:]).sum().item()
    assert changed


def test_codes_under_what_is_resampled_do_not_matter(seed):
    model = make()
    resample = torch.ones(3, 4, dtype=torch.bool)
    seeds = torch.randint(2**62, (1,))
    given = torch.full((1, 12), -1)
    text = model.pack_text([[1, 2]])
    generated = generate_codes(model, text, seeds=seeds, given=given, resample=resample)
    assert torch.equal(generated, generate_codes(model, text, seeds=seeds))
    assert (given == -1).all()


def test_memory_of_the_published_model():
    """147 GB of image keys and values for 512 candidates in bfloat16, and a few GB of text and logits."""
    with torch.device("meta"):
        model = Prior(PriorConfig.preset("dalle-12b")).bfloat16()
    text = 2 * 64 * 256 * 3968 * 2 / 512
    found = sequence_bytes(model, 512)
    assert 147e9 / 512 + text < found < 1.01 * (147e9 / 512 + text)
    assert sequence_bytes(model, 1) - found > 2 * 64 * 256 * 3968 * 2 * 511 / 512


def test_samples_do_not_depend_on_the_batch(seed):
    model = make()
    captions, _ = batch(SMALL, 3)
    text, seeds = model.pack_text(captions), torch.randint(2**62, (12,))
    together = generate_codes(model, text, candidates=4, seeds=seeds)
    for p in range(3):
        for c in range(4):
            alone = generate_codes(model, text[p : p + 1], seeds=seeds[4 * p + c : 4 * p + c + 1])
            assert torch.equal(alone[0], together[4 * p + c])


def test_samples_follow_the_distribution(seed):
    """With two codes in one row, the frequencies of the four images match the model's probabilities."""
    config = PriorConfig(3, 5, (1, 2), 2, layers=2, heads=1, head_dim=8, conv_kernel=3)
    model = make(config)
    text, count = model.pack_text([[1, 2]]), 4000
    generated = generate_codes(model, text, candidates=count).flatten(1)
    images = torch.cartesian_prod(torch.arange(2), torch.arange(2))
    with torch.no_grad():
        log_p = model(text.expand(4, -1), images)[1].log_softmax(-1)
    expected = log_p.double().gather(2, images[..., None])[..., 0].sum(1).exp()
    observed = torch.stack([(generated == image).all(1).sum() for image in images])
    assert frequencies_p(observed, expected) > REJECT, f"{observed} against {count * expected}"


def test_one_token_text_conditions_the_image(seed):
    """A model that memorises one image per word generates these images."""
    config = PriorConfig(3, 4, (2, 3), 8, layers=3, heads=2, head_dim=16, conv_kernel=3)
    model = Prior(config)
    text, codes = model.pack_text([[0], [1], [2], [3]]), torch.randint(8, (4, 6))
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(120):
        optimizer.zero_grad()
        model.loss(text, codes)["loss"].backward()
        optimizer.step()
    generated = generate_codes(model, text, candidates=2, top_k=1).flatten(1)
    assert torch.equal(generated, codes.repeat_interleave(2, 0))


def test_autocast_stays_close(seed):
    model = make(scale=2)
    captions, codes = batch(SMALL, 4)
    text = model.pack_text(captions)
    exact = model.loss(text, codes)["loss"].item()
    with torch.autocast("cpu", torch.bfloat16):
        loss = model.loss(text, codes)["loss"]
        assert generate_codes(model, text).shape == (4, 3, 4)
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(exact, rel=0.02)
    loss.backward()
    assert all(math.isfinite(p.grad.sum()) for p in model.parameters() if p.grad is not None)


def test_bfloat16_weights_generate(seed):
    model = make().bfloat16()
    generated = generate_codes(model, model.pack_text([[1, 2]]), candidates=3)
    assert generated.shape == (3, 3, 4) and generated.min() >= 0 and generated.max() < SMALL.image_vocab


# -- one step as a CUDA graph


def last(count, grid=SMALL.grid):
    return (torch.arange(math.prod(grid)) >= math.prod(grid) - count).view(grid)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize(
    ("resample", "replays"),
    [(None, 10), (last(7), 5), (last(3), 1), (last(2), None), (last(1), None), (torch.eye(3, 4).bool() | last(1), 10)],
    ids=["all", "last 7", "last 3", "last 2", "last", "scattered"],
)
def test_a_captured_step_samples_the_same(resample, replays, autocast, monkeypatch, seed):
    model = make()
    captions, codes = batch(SMALL, 2)
    part = {} if resample is None else dict(given=codes, resample=resample)
    arguments = dict(candidates=3, seeds=torch.randint(2**62, (6,)), temperature=0.9, top_k=7, **part)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        expected = generate_codes(model, model.pack_text(captions), **arguments)
        graphs = cuda_graph_for_tests.stand_in(monkeypatch)
        monkeypatch.setattr(dk.DecodeCache, "capturable", True)
        assert torch.equal(generate_codes(model, model.pack_text(captions), **arguments), expected)
    assert [graph.replays for graph in graphs] == ([] if replays is None else [replays])
    weights = {id(weight) for weight in model.parameters()}
    for graph in graphs:  # autocast's copies of the weights were made before and are not made again in every step
        assert not any(id(call[1][0]) in weights for call in graph.calls if call[0] is torch.ops.aten._to_copy.default)


@pytest.fixture
def fake_cuda(monkeypatch):
    """Fake tensors on a GPU, which need not exist, and the registered operations for them."""
    assert backends.cpu.problem is None
    stub = copy.copy(backends.cpu)
    stub.name, stub.devices = "cuda", ("cuda",)
    monkeypatch.setitem(backends.BACKENDS, "cuda", stub)
    # Its plan would be copied to the device, for the caption and before the steps.
    monkeypatch.setattr("dalle_kernels.nn.sparse_attention", lambda q, k, v, pattern: torch.empty_like(q))
    schedule_tensor.cache_clear()
    with FakeTensorMode(allow_non_fake_inputs=False), torch.device("cuda"), cuda_graph_for_tests.WithoutDevice():
        yield
    schedule_tensor.cache_clear()  # of the fake ones


def generate_fakes(dtype, **how):
    """Generates with fake weights; reading a fake tensor, which has no values, on the host raises."""
    with torch.device("meta"):
        model = Prior(SMALL)
    for module in model.modules():
        for name, weight in module.named_parameters(recurse=False):
            module.register_parameter(name, nn.Parameter(torch.empty(weight.shape, dtype=dtype)))
    text, seeds = torch.zeros(2, 5, dtype=torch.int64), torch.zeros(6, dtype=torch.int64)
    return generate_codes(model, text, candidates=3, seeds=seeds, **how)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_generation_does_not_synchronise_with_the_device(dtype, fake_cuda, monkeypatch):
    graphs = cuda_graph_for_tests.stand_in(monkeypatch)
    generated = generate_fakes(dtype, top_k=4, top_p=0.9)
    assert generated.shape == (6, 3, 4) and generated.device.type == "cuda"
    [graph] = graphs
    assert graph.replays == 10 and {x.device.type for x in graph.tensors()} == {"cuda"}
    operations = [str(call[0]) for call in graph.calls]
    assert operations.count("dalle_kernels.decode_attention.default") == SMALL.layers
    assert operations.count("dalle_kernels.sample_tokens.default") == 1


def test_reference_synchronises_and_is_not_captured(fake_cuda, monkeypatch):
    graphs = cuda_graph_for_tests.stand_in(monkeypatch)
    with dk.use_backend("reference"), pytest.raises(DataDependentOutputException):
        generate_fakes(torch.float32)
    assert not graphs


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (dict(text_len=1), "text_len >= 2"),
        (dict(heads=0), "at least 1"),
        (dict(conv_kernel=4), "odd"),
        (dict(grid=(0, 3)), "at least 1"),
    ],
)
def test_impossible_sizes(change, reason):
    arguments = dict(text_len=5, text_vocab=11, grid=(3, 4), image_vocab=9, layers=4, heads=2) | change
    with pytest.raises(UserError, match=reason):
        PriorConfig(**arguments)


def test_bad_input():
    model = Prior(SMALL)
    text = model.pack_text([[1]])
    with pytest.raises(UserError, match="candidates must be at least 1, not 0"):
        generate_codes(model, text, candidates=0)
    with pytest.raises(UserError, match="2 seeds"):
        generate_codes(model, text, candidates=2, seeds=torch.zeros(3, dtype=torch.int64))
    with pytest.raises(UserError, match="an image has 12 codes, not 3"):
        model.loss(text, torch.zeros(1, 3, dtype=torch.int64))
    with pytest.raises(UserError, match="from pack_text"):
        model.loss(text[:, :3], torch.zeros(1, 12, dtype=torch.int64))
    with pytest.raises(UserError, match="no preset 'huge'"):
        PriorConfig.preset("huge")


CODES, RESAMPLE = torch.zeros(1, 12, dtype=torch.int64), torch.ones(3, 4, dtype=torch.bool)


@pytest.mark.parametrize(
    ("given", "resample", "reason"),
    [
        (CODES, None, "give both or neither"),
        (None, RESAMPLE, "give both or neither"),
        (CODES[:, :8], RESAMPLE, r"must be int64 \[1, 3, 4\], not int64 \[1, 8\]"),
        (CODES.repeat(2, 1), RESAMPLE, r"must be int64 \[1, 3, 4\], not int64 \[2, 12\]"),
        (CODES.float(), RESAMPLE, r"must be int64 \[1, 3, 4\], not float32 \[1, 12\]"),
        (CODES, RESAMPLE.flatten(), r"must be bool \[3, 4\], not bool \[12\]"),
        (CODES, RESAMPLE.long(), r"must be bool \[3, 4\], not int64 \[3, 4\]"),
        (CODES, ~RESAMPLE, "nothing to generate"),
        (CODES, torch.arange(12).view(3, 4) < 11, "reach the bottom right"),
        (CODES + 9, torch.arange(12).view(3, 4) > 3, r"must be in \[0, 9\), not 9 to 9"),
        (CODES - 1, torch.arange(12).view(3, 4) > 3, r"must be in \[0, 9\), not -1 to -1"),
    ],
)
def test_what_cannot_be_completed(given, resample, reason):
    model = Prior(SMALL)
    with pytest.raises(UserError, match=reason):
        generate_codes(model, model.pack_text([[1]]), given=given, resample=resample)

"""The CPU benchmarks on tiny sizes: that they run, what they compare, and what they write."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import bench_model
import pytest
import torch
from common.plain_attention import plain_attention
from comparison import compare

import dalle_kernels as dk
from dalle.generation.sampler import generate_codes
from dalle.models.prior import Prior, PriorConfig

ROOT = Path(__file__).parents[1]
NAMES = {path.stem.removeprefix("bench_") for path in ROOT.glob("benchmarks/bench_*.py")}


def test_all_on_tiny_sizes(tmp_path):
    options = ["--benchmark-enable", "--benchmark-only", "--benchmark-quiet", "--results", str(tmp_path)]
    # pytest-benchmark measures nothing in a worker of pytest-xdist
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    environment["DALLE_BENCH"] = "tiny"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "benchmarks", *options]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr

    assert {path.stem.split("-")[0] for path in tmp_path.glob("*-cpu*.json")} == NAMES
    for path in tmp_path.glob("*.json"):
        data, page = json.loads(path.read_text()), path.with_suffix(".md").read_text()
        assert {"date", "processor", "threads", "instruction set", "torch", "command"} <= data["conditions"].keys()
        for row in data["rows"]:
            assert all(0 < low <= middle <= high < math.inf for low, middle, high in row["seconds"].values())
            assert row["ratios"].keys() == row["seconds"].keys() - {"ours"}
            assert row["case"] in page and row["about"]
    assert list(tmp_path.glob("cpu*.png"))


def test_ratios_are_taken_within_a_round(monkeypatch):
    clock = iter([0, 1, 1, 4, 4, 6, 6, 12])  # 1 and 3 seconds, then 2 and 6
    monkeypatch.setattr("comparison.time", SimpleNamespace(perf_counter=lambda: next(clock)))
    times, ratios = compare({"ours": lambda: None, "other": lambda: None}, rounds=2)
    assert times == {"ours": [1, 1.5, 2], "other": [3, 4.5, 6]}
    assert ratios == {"other": [3, 3, 3]}


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("name", ["row", "column", "conv"])
def test_plain_attention_is_the_pattern(seed, name, rows):
    options = {"kernel": 3} if name == "conv" else {}
    pattern = getattr(dk.AttentionPattern, name)(5, (6, 4), **options)
    q, k, v = torch.randn(3, 2, 3, pattern.seq_len, 8, dtype=torch.float64).unbind(0)
    expected = dk.sparse_attention(q, k, v, pattern, backend="reference")
    torch.testing.assert_close(plain_attention(pattern, rows)(q, k, v), expected)


def test_the_masked_model_generates_the_same_images(seed):
    """The causal one generates others. Large weights make the result depend on attention."""
    prior = Prior(PriorConfig(6, 50, (4, 4), 40, layers=4, heads=2, head_dim=16, conv_kernel=3)).double()
    attentions = [layer.attention for layer in prior.layers]
    for linear in [prior.image_head, *(part for attention in attentions for part in (attention.qkv, attention.out))]:
        torch.nn.init.normal_(linear.weight)
    text, seeds = prior.pack_text([[1, 2], [3]]), torch.arange(4)

    def generate():
        return generate_codes(prior, text, candidates=2, seeds=seeds)

    assert torch.equal(bench_model.using(bench_model.PRIORS["masked SDPA"], generate)(), generate())
    causal = bench_model.using(bench_model.PRIORS["causal SDPA"], generate)()
    assert not torch.equal(causal, generate())


def test_the_plain_dvae_has_the_same_kl(seed):
    logits = torch.randn(2, 30, 4, 4, dtype=torch.float64)
    plain = bench_model.plain_gumbel_softmax(logits, 0.9, dim=1, seed=1, return_kl=True)
    expected = dk.gumbel_softmax(logits, 0.9, dim=1, seed=1, return_kl=True)
    assert plain[0].shape == expected[0].shape
    torch.testing.assert_close(plain[1], expected[1].to(plain[1].dtype))

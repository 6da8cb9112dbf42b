"""The command that tunes the Triton kernels, without a GPU: the kernels that it times, and the lines that it prints."""

import itertools
import math

import pytest
import torch

pytest.importorskip("triton")

from dalle_kernels import tune
from dalle_kernels.backends import BACKENDS
from dalle_kernels.backends.triton import launch
from dalle_kernels.backends.triton.launch import Launch

BEST = {  # for 16 bits; for 32 half the columns
    "sparse_attention": Launch(128, 64, 8, 3),
    "sparse_attention.grad_q": Launch(128, 64, 4, 2),
    "sparse_attention.grad_kv": Launch(32, 128, 8, 1),
    "gumbel_softmax": Launch(256, 32, 16, 1),
    "gumbel_softmax.last": Launch(1, 4096, 16, 1),
    "sample_tokens": Launch(1, 4096, 8, 1),
    "decode_attention.text": Launch(32, 128, 8, 3),
    "decode_attention.image": Launch(1, 64, 2, 2),
}
KERNELS = {
    name: [kernel for group in operation.groups for kernel in group.kernels]
    for name, operation in tune.OPERATIONS.items()
}


def test_every_kernel_of_the_table_can_be_tuned():
    assert sorted(itertools.chain(*KERNELS.values())) == sorted(launch.TABLE) == sorted(BEST)


@pytest.fixture
def overrides():
    yield launch.OVERRIDES
    launch.OVERRIDES.clear()


def best(kernel, bytes):
    rows, columns, *schedule = BEST[kernel]
    return Launch(rows, columns * 2 // bytes, *schedule)


@pytest.mark.parametrize("operation", KERNELS)
def test_the_lines_are_the_best(operation, overrides, monkeypatch, capsys):
    """A simulated GPU on which each kernel has a best launch, and cannot run with fewer warps."""

    def milliseconds(bytes):
        tried = {kernel: line for kernel, line in overrides.items() if kernel in KERNELS[operation]}
        if any(line.warps < best(kernel, bytes).warps for kernel, line in tried.items()):
            return math.inf
        return sum(abs(math.log(a / b)) for k, line in tried.items() for a, b in zip(line, best(k, bytes)))

    prepared = tune.OPERATIONS[operation]._replace(prepare=lambda dtype, head_dim: dtype.itemsize)
    monkeypatch.setitem(tune.OPERATIONS, operation, prepared)
    monkeypatch.setattr(tune, "milliseconds", milliseconds)
    monkeypatch.setattr(launch, "architecture", lambda device: "sm_90")
    tune.main([operation, "--head-dims", "64", "128"])
    pasted = eval("{" + capsys.readouterr().out + "}", {"Launch": Launch})
    head_dims = (64, 128) if "attention" in operation else (0,)
    assert pasted == {
        kernel: {("sm_90", dim, bytes): best(kernel, bytes) for bytes in (2, 4) for dim in head_dims}
        for kernel in KERNELS[operation]
    }
    for kernel, lines in pasted.items():
        monkeypatch.setitem(launch.TABLE, kernel, {**launch.TABLE[kernel], **lines})
        launch.OVERRIDES.clear()
        assert launch.lookup(kernel, torch.device("cpu"), head_dims[0], torch.float32) == best(kernel, 4)


def test_only_what_is_asked_for(monkeypatch, capsys, overrides):
    monkeypatch.setattr(tune, "milliseconds", lambda run: 1.0)
    monkeypatch.setattr(launch, "architecture", lambda device: "sm_90")
    prepared = tune.OPERATIONS["decode_attention"]._replace(prepare=lambda dtype, head_dim: None)
    monkeypatch.setitem(tune.OPERATIONS, "decode_attention", prepared)
    tune.main(["decode_attention", "--dtypes", "bfloat16", "--head-dims", "64"])
    pasted = eval("{" + capsys.readouterr().out + "}", {"Launch": Launch})
    assert [list(lines) for lines in pasted.values()] == [[("sm_90", 64, 2)]] * 2


def test_a_gpu_on_which_nothing_runs(overrides, monkeypatch):
    monkeypatch.setattr(tune, "milliseconds", lambda run: math.inf)
    with pytest.raises(RuntimeError, match=r"no candidate for decode_attention\.text runs"):
        tune.tune(tune.OPERATIONS["decode_attention"].groups[0], None)


@pytest.mark.parametrize("operation", KERNELS)
def test_what_is_run(operation, monkeypatch):
    """Runs the operation up to the launch of its kernels, which looks up the lines to tune."""
    used = set()
    lookup = launch.lookup
    monkeypatch.setattr(launch, "lookup", lambda kernel, *arguments: used.add(kernel) or lookup(kernel, *arguments))
    monkeypatch.setattr(launch, "start", lambda *arguments, **constants: None)
    assert BACKENDS["triton"].problem is None
    monkeypatch.setattr(type(BACKENDS["triton"]), "reasons", lambda self, operation, tensor, uses: ())
    monkeypatch.setattr(tune, "DEVICE", torch.device("cpu"))
    monkeypatch.setattr(torch, "randn", torch.empty)  # large, and never read
    with tune.use_backend("triton"):
        tune.OPERATIONS[operation].prepare(torch.bfloat16, 64)()
    assert used == set(KERNELS[operation])

"""The conformance suite on every target that this machine has. Triton's interpreter needs a process of its own:

TRITON_INTERPRET=1 python -m pytest -q tests/test_conformance.py
"""

import pytest
import torch
from conformance import Target, cases
from cuda_emulation.backend import EmulatedBackend

from dalle_kernels.backends import BACKENDS
from dalle_kernels.backends.triton import interpreted, launch

BACKENDS["emulated"] = EmulatedBackend()  # after the others: taken only where it is named


def targets():
    if interpreted():
        return [Target("triton", dtypes=("float32", "float16"), simulated=True)]
    found = [
        Target("cpu"),
        Target("reference", kernels=False, compiles=False),
        Target("emulated", simulated=True, compiles=False),
    ]
    if torch.cuda.is_available():
        found += [Target(name, "cuda") for name in ("cuda", "triton") if BACKENDS[name].problem is None]
    return found


CASES = [(target, case) for target in targets() for case in cases(target)]


@pytest.fixture(autouse=True)
def usable(request, monkeypatch):
    """The interpreter's time goes by steps, whatever their size: few and large ones."""
    target = request.node.callspec.params["target"]
    if target.backend == "triton":
        reasons = BACKENDS["triton"].reasons("sample_tokens", torch.empty(1, 1, device=target.device))
        if reasons:
            pytest.skip("; ".join(reasons))
    elif target.backend != "emulated" and BACKENDS[target.backend].problem:
        pytest.skip(BACKENDS[target.backend].problem)
    if interpreted():
        for kernel in ("sparse_attention", "sparse_attention.grad_q", "sparse_attention.grad_kv"):
            monkeypatch.setitem(launch.OVERRIDES, kernel, launch.Launch(64, 64, 4, 2))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of NumPy in the interpreter, where padding divides 0 by 0
@pytest.mark.parametrize(
    ("target", "case"),
    [pytest.param(*pair, marks=[pytest.mark.slow] if pair[1].slow else []) for pair in CASES],
    ids=[f"{target.backend}: {case.name}" for target, case in CASES],
)
def test_conforms(target, case, seed):
    case.check()

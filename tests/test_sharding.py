"""DTensors and FSDP2, on two processes."""

import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor

import pytest
from processes_for_tests import server

RANKS = 2


def on_rank(check, rank, store):
    from sharding_for_tests import run  # in the ranks only: its imports take seconds

    return run(check, rank, RANKS, store)


@pytest.fixture(scope="module")
def processes():
    with ProcessPoolExecutor(RANKS, mp_context=server()) as pool:
        yield pool


def on_ranks(processes, check, folder):
    """The results of a check of sharding_for_tests on every rank. A rank waits for the others in any process."""
    calls = [processes.submit(on_rank, check, rank, str(folder / "store")) for rank in range(RANKS)]
    return [call.result() for call in calls]


@pytest.mark.parametrize("check", ["attention", "options", "generation"])
def test_sharded_equals_whole(check, processes, tmp_path):
    on_ranks(processes, check, tmp_path)


def test_what_cannot_be_sharded(processes, tmp_path):
    for messages in on_ranks(processes, "refused", tmp_path):
        mixed, different, tokens, partial, grouped, unseeded, cached = messages
        assert mixed == "TypeError: q, k and v must all be DTensors if one is; got DTensor, Tensor and DTensor"
        assert different.startswith("ValueError: q, k and v must share one mesh and placements; got (Shard(dim=0),)")
        may_be = "ValueError: q, k and v may be sharded over the batch, Shard(0), or heads, Shard(1); got "
        assert tokens.startswith(may_be + "(Shard(dim=2),)") and partial.startswith(may_be + "(Partial(sum),)")
        assert cached == "k and v must be plain tensors, as the cache's are; pass x.to_local()"
        assert "must be divisible by their 2 shards; got 3" in grouped
        assert unseeded.endswith("dropout on DTensors needs a seed, since every rank would take another one")


def test_import_leaves_dtensors_alone():
    code = "import sys, dalle_kernels; print('torch.distributed.tensor' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"

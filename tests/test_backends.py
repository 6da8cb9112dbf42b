"""Backend selection: per thread, under torch.compile, and in `prepare`."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import dalle_kernels as dk
from dalle_kernels import backends
from dalle_kernels.backends.plans import plan_tensors

PATTERN = dk.AttentionPattern.row(3, (4, 4))


def test_operations_and_backends():
    for backend in backends.BACKENDS.values():
        assert backend.problem or set(backend.operations) == set(backends.OPERATIONS)
    message = "backend='gpu' is not one of 'cuda', 'triton', 'cpu', 'reference'"
    with pytest.raises(ValueError, match=message), dk.use_backend("gpu"):
        pass


def test_interleaved_blocks_of_two_threads():
    """Each thread has its own forced backend, and none remains afterwards."""
    entered, left, seen = threading.Event(), threading.Event(), {}

    def first():
        with dk.use_backend("reference"):
            entered.wait(10)
            seen["first"] = backends.forced()
        left.set()

    def second():
        with dk.use_backend("cpu"):
            entered.set()
            left.wait(10)
            seen["second"] = backends.forced()

    threads = [threading.Thread(target=f) for f in (first, second)]
    with dk.use_backend("cpu"):
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert backends.forced() == "cpu"
    assert seen == {"first": "reference", "second": "cpu"} and backends.forced() is None


def test_thread_pools():
    """A worker forces and restores its own backend; it does not inherit its creator's."""

    def work(name):
        before = backends.forced()
        with dk.use_backend(name):
            return before, backends.forced()

    names = ["cpu", "reference", None] * 20
    with dk.use_backend("reference"), ThreadPoolExecutor(3) as pool:
        assert list(pool.map(work, names)) == [(None, name) for name in names]


def test_nested_blocks_and_errors():
    with dk.use_backend("cpu"):
        with dk.use_backend(None):
            assert backends.forced() is None
        with pytest.raises(RuntimeError), dk.use_backend("reference"):
            raise RuntimeError
        assert backends.forced() == "cpu"


def test_the_environment_forces_every_thread(monkeypatch):
    monkeypatch.setenv("DALLE_KERNELS_BACKEND", "reference")
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(backends.forced).result() == "reference"


@pytest.fixture
def graphs():
    """compiled(f): torch.compile(f) that records this project's operations in each of its graphs."""
    torch._dynamo.reset()

    def compiled(function):
        def record(graph, inputs):
            compiled.recorded.append([n.target for n in graph.graph.nodes if "dalle_kernels" in str(n.target)])
            return graph.forward

        return torch.compile(function, backend=record, fullgraph=True)

    compiled.recorded = []
    return compiled


@pytest.mark.skipif(backends.BACKENDS["cpu"].problem is not None, reason="needs the compiled CPU kernels")
def test_compiled_code_follows_the_block(graphs, seed):
    """There is one graph per backend, and each is reused."""
    logits = torch.randn(3, 7)
    function = graphs(lambda x: dk.gumbel_softmax(x, seed=1))
    for name in ("cpu", "reference", "cpu", "reference"):
        with dk.use_backend(name):
            torch.testing.assert_close(function(logits), dk.gumbel_softmax(logits, seed=1))
    assert [bool(graph) for graph in graphs.recorded] == [True, False]


def test_a_block_inside_compiled_code(graphs, seed):
    def step(x):
        with dk.use_backend("reference"):
            return dk.gumbel_softmax(x, seed=1)

    logits = torch.randn(3, 7)
    torch.testing.assert_close(graphs(step)(logits), step(logits))
    assert graphs.recorded == [[]] and backends.forced() is None


@pytest.mark.skipif(backends.BACKENDS["cpu"].problem is not None, reason="needs the compiled CPU kernels")
def test_prepare_fills_the_cache_that_calls_read():
    pattern = dk.AttentionPattern.conv(2, (5, 3), kernel=3)
    for n in (None, 9):
        dk.prepare(pattern, device="cpu", dtype=torch.float32, head_dim=8, n=n)
        misses = plan_tensors.cache_info().misses
        dk.sparse_attention(*torch.randn(3, 1, 1, n or pattern.seq_len, 8), pattern)
        assert plan_tensors.cache_info().misses == misses


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"n": 20}, ValueError, r"n must lie in \[1, 19\], the pattern's length; got 20"),
        ({"head_dim": 0}, ValueError, "head_dim must be at least 1; got 0"),
        ({"dtype": torch.int32}, TypeError, "dtype must be float32, bfloat16, float16 or float64; got torch.int32"),
        ({"device": "gpu"}, ValueError, "device must be one that this PyTorch can use; got 'gpu': "),
        ({"pattern": "row"}, TypeError, "pattern must be an AttentionPattern; got str"),
    ],
)
def test_prepare_refuses(changed, error, message):
    arguments = {"pattern": PATTERN, "device": "cpu", "dtype": torch.float32, "head_dim": 8, **changed}
    with pytest.raises(error, match=message):
        dk.prepare(**arguments)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_prepare_for_a_gpu_that_is_not_there():
    with pytest.raises(ValueError, match="device must be one that this PyTorch can use; got 'cuda': "):
        dk.prepare(PATTERN, device="cuda", dtype=torch.float32, head_dim=8)

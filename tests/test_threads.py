"""The CPU kernels with threads and processes: PyTorch's number of threads, several Python threads, the GIL, forked
processes.
"""

import ctypes
import itertools
import os
import subprocess
import sys
import textwrap
import threading

import pytest
import torch

import dalle_kernels as dk

ROW = dk.AttentionPattern.row(32, (16, 16))


@pytest.fixture
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def python(code):
    """The output of a new interpreter; fails after a time limit."""
    head = "import hashlib, os, threading, time, torch, dalle_kernels as dk\n"
    command = [sys.executable, "-c", head + textwrap.dedent(code)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout.split()


def test_the_number_of_threads_is_honoured():
    """Kernels start as many threads as PyTorch's setting; with one thread, those already started keep sleeping."""
    code = """
    caller = str(threading.get_native_id())
    logits = torch.zeros(512, 8192)

    def others():
        return sorted(set(os.listdir("/proc/self/task")) - {caller})

    def naps():
        "The number of times that each of them has gone to sleep, when all are asleep."
        last = None
        while True:
            status = [open(f"/proc/self/task/{thread}/status").read() for thread in others()]
            count = [text.partition("\\nvoluntary_ctxt_switches:")[2].split()[0] for text in status]
            if count == last and all("State:\\tS" in text for text in status):
                return count
            last = count
            time.sleep(0.1)

    torch.set_num_threads(1)
    before = len(others())
    for threads in (1, 3):
        torch.set_num_threads(threads)
        dk.gumbel_softmax(logits, seed=1, backend="cpu")
        print(len(others()) - before)
    for threads in (1, 3):
        torch.set_num_threads(threads)
        known = naps()
        dk.gumbel_softmax(logits, seed=1, backend="cpu")
        print(naps() == known)
    """
    assert python(code) == ["0", "2", "True", "False"]


def problems():
    """Functions that return tensors: every kernel, in different shapes."""
    q, k, v, grad = torch.randn(4, 2, 3, ROW.seq_len, 64)
    logits = torch.randn(64, 4096)
    seeds = torch.arange(64)
    one = torch.randn(3, 6, 2, 64)
    cache = dk.DecodeCache([ROW], prompts=2, candidates=3, heads=2, head_dim=64, dtype=torch.float32)
    text = torch.randn(2, 2, 2, 32, 64)

    def attention(*leaves):
        leaves = [x.clone().requires_grad_() for x in leaves]
        out = dk.sparse_attention(*leaves, ROW, backend="cpu")
        out.backward(grad[: len(out)].to(out.dtype))
        return [out.detach(), *(x.grad for x in leaves)]

    def decode():
        cache.reset()
        cache.prefill(0, *text)
        return dk.decode_attention(*one, cache, 0)

    return [
        lambda: attention(q, k, v),
        lambda: attention(*(x[:1].bfloat16() for x in (q, k, v))),
        lambda: [dk.gumbel_softmax(logits, seed=3, backend="cpu"), dk.gumbel_softmax(logits[:9], seed=4, dim=0)],
        lambda: [dk.sample_tokens(logits, top_k=50, seed=seeds, offset=seeds, backend="cpu"), decode()],
    ]


def test_calls_from_several_python_threads_at_once(seed):
    tasks = problems()
    expected = [task() for task in tasks]
    wrong = []

    def work(task, results):
        for _ in range(5):
            if not all(torch.equal(a, b) for a, b in zip(task(), results, strict=True)):
                wrong.append(task)

    workers = [threading.Thread(target=work, args=pair) for pair in zip(tasks, expected)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


def long_calls():
    many = dk.AttentionPattern.row(256, (32, 32))
    q, k, v = (x.requires_grad_() for x in torch.randn(3, 1, 8, many.seq_len, 64).unbind(0))
    logits = torch.randn(2048, 8192)
    out = dk.sparse_attention(q, k, v, many, backend="cpu")
    return {
        "attention": lambda: dk.sparse_attention(*(x.detach().repeat(8, 1, 1, 1) for x in (q, k, v)), many),
        "attention backward": lambda: torch.autograd.grad(out.sum(), (q, k, v)),
        "gumbel": lambda: dk.gumbel_softmax(logits, seed=1, backend="cpu"),
        "sample": lambda: dk.sample_tokens(logits, top_p=0.9, seed=1, backend="cpu"),
    }


def ticks_during(call):
    """How often another Python thread, which sleeps for a millisecond at a time, runs during a call."""
    ticks, stop = itertools.count(), threading.Event()

    def tick():
        while not stop.wait(0.001):
            next(ticks)

    ticker = threading.Thread(target=tick)
    ticker.start()
    before = next(ticks)
    call()
    after = next(ticks)
    stop.set()
    ticker.join()
    return after - before - 1


@pytest.mark.parametrize("name", ["attention", "attention backward", "gumbel", "sample"])
def test_other_python_threads_run_meanwhile(name, one_thread, seed):
    assert ticks_during(long_calls()[name]) > 10


def test_a_call_that_keeps_other_threads_waiting_is_noticed():
    assert ticks_during(lambda: ctypes.PyDLL(None).usleep(200_000)) < 5


def test_forked_processes():
    """A forked process has none of its parent's threads. If the parent used several, PyTorch's own large operations
    hang there; ours run on one thread, with the same bits.
    """
    code = """
    torch.set_num_threads(2)
    logits = torch.randn(64, 8192)
    pattern = dk.AttentionPattern.row(16, (8, 8))
    q, k, v = (x.requires_grad_() for x in torch.randn(3, 2, 5, 80, 32).unbind(0))

    def forward():
        y, out = dk.gumbel_softmax(logits, seed=5, backend="cpu"), dk.sparse_attention(q, k, v, pattern, backend="cpu")
        return [y.numpy().tobytes(), out.detach().numpy().tobytes()], out

    def both():
        results, out = forward()
        return results + [x.numpy().tobytes() for x in torch.autograd.grad(out, (q, k, v), torch.ones(q.shape))]

    expected = forward()[0]
    here, there = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(there, hashlib.sha256(b"".join(both())).digest())
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    results = both()
    print(results[:2] == expected, os.read(here, 32) == hashlib.sha256(b"".join(results)).digest())

    def same(_):
        torch.set_num_threads(2)  # DataLoader sets one thread in workers
        return forward()[0] == expected

    print(*torch.utils.data.DataLoader(range(4), num_workers=2, collate_fn=same, multiprocessing_context="fork"))
    """
    assert python(code) == ["0", "True", "True"] + ["True"] * 4

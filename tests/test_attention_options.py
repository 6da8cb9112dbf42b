"""The options of sparse_attention: grouped queries, keys before the first query, text lengths, dropout, and patterns
that are not causal.
"""

import itertools
import pickle
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import scaled_dot_product_attention as sdpa

import dalle_kernels as dk
from accuracy import assert_accurate, mostly
from conformance.target import DTYPES, same
from dalle_kernels import backends
from dalle_kernels.philox import random_bits
from dalle_kernels.plan import TileShape, compile_plan
from patterns_for_tests import every_pattern
from statistics_for_tests import REJECT, binomial_p

P = dk.AttentionPattern
RESULTS = ("out", "lse", "dq", "dk", "dv")


def patterns(text_len, grid):
    n = text_len + grid[0] * grid[1]
    both_ways = (torch.rand(n, n) < 0.4).fill_diagonal_(True)
    order = torch.randperm(n).tolist()
    return every_pattern(text_len, grid) | {"both ways": P.from_mask(both_ways, text_len, order, causal=False)}


NAMES = tuple(patterns(1, (2, 2)))


@dataclass
class Problem:
    """Tensors, a pattern and options."""

    pattern: dk.AttentionPattern
    tensors: list
    grad: torch.Tensor
    options: dict

    @classmethod
    def random(
        cls, name, text_len=13, grid=(7, 9), *, queries=None, keys=None, batch=4, heads=4, group=1, dim=32,
        lengths=False, dropout_p=0.0, head_offset=0, dtype=torch.float32,
    ):  # fmt: skip
        pattern = patterns(text_len, grid)[name]
        n = keys or pattern.seq_len
        queries = queries or n
        q, grad = torch.randn(2, batch, heads, queries, dim).to(dtype)
        k, v = torch.randn(2, batch, heads // group, n, dim).to(dtype)
        options = {}
        if lengths:
            options["text_lengths"] = torch.randint(0, text_len + 1, (batch,))
        if dropout_p:
            seeds = torch.randint(-(2**63), 2**63 - 1, (batch,))
            options.update(dropout_p=dropout_p, seed=seeds, head_offset=head_offset)
        return cls(pattern, [q, k, v], grad, options)

    def run(self, attention, dtype=None):
        """Outputs and gradients of attention(q, k, v) -> (out, lse)."""
        leaves = [x.detach().to(dtype or x.dtype).requires_grad_() for x in self.tensors]
        out, lse = attention(*leaves)
        return [out.detach(), lse.detach(), *torch.autograd.grad(out, leaves, self.grad.to(out.dtype))]

    def on(self, backend, dtype=None):
        def attention(q, k, v):
            return dk.sparse_attention(q, k, v, self.pattern, return_lse=True, backend=backend, **self.options)

        return self.run(attention, dtype)

    def plain(self, dtype=None):
        return self.run(lambda *x: plain_attention(*x, self.pattern, **self.options), dtype)


def plain_attention(q, k, v, pattern, text_lengths=None, dropout_p=0.0, seed=None, head_offset=0):
    """(out, lse) in plain PyTorch and the inputs' dtype, written without `reference`: masks pair by pair."""
    batch, heads, queries, dim = q.shape
    n = k.shape[2]
    k, v = (x.repeat_interleave(heads // k.shape[1], 1) for x in (k, v))
    exists = torch.ones(batch, n, dtype=torch.bool)
    for b, length in enumerate(text_lengths.tolist() if text_lengths is not None else []):
        exists[b, length : pattern.text_len] = False
    seen = pattern.dense()[n - queries : n, :n] & exists[:, None, None]
    absent = ~exists[:, None, n - queries :, None]
    scores = (q @ k.transpose(-1, -2) * dim**-0.5).masked_fill(~(seen | absent), -torch.inf)
    weights = scores.softmax(-1)
    if dropout_p:
        weights = weights * kept_pairs(seed, heads, n - queries, n, dropout_p, head_offset) / (1 - dropout_p)
    out = (weights @ v).masked_fill(absent, 0)
    return out, scores.logsumexp(-1).float().masked_fill(absent[..., 0], -torch.inf)


def kept_pairs(seed, heads, first, n, dropout_p, head_offset=0):
    """Which pairs dropout keeps, one sequence and head at a time."""
    index = torch.tensor([[query * 2**32 + key for key in range(n)] for query in range(first, n)])
    kept = torch.empty(len(seed), heads, *index.shape, dtype=torch.bool)
    for b, h in itertools.product(range(len(seed)), range(heads)):
        kept[b, h] = random_bits(seed[b], torch.tensor(head_offset + h), index) / 2**32 >= dropout_p
    return kept


def check(problem, dtype="float32"):
    """Checks the error bound on "cpu"; the log-sum-exp of absent queries is -inf on both sides."""
    exact, plain = problem.plain(torch.float64), problem.plain()
    for name, ours, e, p in zip(RESULTS, problem.on("cpu"), exact, plain):
        if name == "lse":
            assert torch.equal(ours.isinf(), e.isinf())
            ours, e, p = (x.masked_fill(e.isinf(), 0) for x in (ours, e, p))
        assert_accurate(ours, e.double(), p, f"cpu attention with options {name} {dtype}")


# -- the specification


@pytest.mark.parametrize("name", ["row", "mask", "both ways"])
def test_reference(name, seed):
    """`reference` in float64 against masks and random bits pair by pair."""
    for group, queries, lengths, dropout_p in itertools.product((1, 4), (17, 5), (False, True), (0.0, 0.3)):
        problem = Problem.random(
            name, 5, (3, 4), batch=2, group=group, queries=queries, dim=8, lengths=lengths, dropout_p=dropout_p,
            head_offset=3,
        )  # fmt: skip
        for ours, expected in zip(problem.on("reference", torch.float64), problem.plain(torch.float64)):
            torch.testing.assert_close(ours.double(), expected.double(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_against_sdpa(backend, seed):
    problem = Problem.random("both ways", group=2, queries=30, dim=40)
    mask = problem.pattern.dense()[-30:]
    expected = problem.run(lambda q, k, v: (sdpa(q, k, v, attn_mask=mask, enable_gqa=True), q.sum(-1)))
    ours = problem.on(backend)
    for i in (0, 2, 3, 4):
        torch.testing.assert_close(ours[i], expected[i], rtol=1e-4, atol=1e-5)


def test_gradients_of_the_reference_by_finite_differences(seed):
    pattern = P.from_mask(torch.ones(6, 6, dtype=torch.bool), 3, causal=False)
    q = torch.randn(2, 2, 4, 2, dtype=torch.float64, requires_grad=True)
    k, v = (torch.randn(2, 1, 6, 2, dtype=torch.float64, requires_grad=True) for _ in range(2))
    options = dict(text_lengths=torch.tensor([1, 3]), dropout_p=0.3, seed=torch.tensor([4, 5]))
    torch.autograd.gradcheck(lambda *x: dk.sparse_attention(*x, pattern, **options), (q, k, v))


# -- the CPU kernels


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", NAMES)
def test_every_option_on_cpu(name, dtype, seed):
    kinds = (
        dict(group=2), dict(queries=33), dict(queries=1, keys=40), dict(lengths=True), dict(dropout_p=0.4), dict(),
        dict(group=4, queries=50, lengths=True, dropout_p=0.1, head_offset=2, dim=24),
    )  # fmt: skip
    for options in kinds:
        check(Problem.random(name, dtype=DTYPES[dtype], **options), dtype)


@given(
    st.integers(0, 2**31), st.sampled_from(NAMES), st.integers(0, 40), st.tuples(st.integers(1, 9), st.integers(1, 9)),
    st.sampled_from([1, 2, 4]), st.integers(1, 70), st.booleans(), st.sampled_from([0.0, 0.1, 0.9]),
    st.sampled_from(list(DTYPES)), st.data(),
)  # fmt: skip
def test_options_of_any_shape_on_cpu(number, name, text_len, grid, group, dim, lengths, dropout_p, dtype, data):
    n = data.draw(st.integers(1, text_len + grid[0] * grid[1]))
    queries = data.draw(st.integers(1, n))
    torch.manual_seed(number)
    mostly(
        lambda: check(
            Problem.random(
                name, text_len, grid, keys=n, queries=queries, group=group, dim=dim, lengths=lengths,
                dropout_p=dropout_p, head_offset=number, dtype=DTYPES[dtype],
            ),
            dtype,
        )
    )  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
def test_bits_do_not_depend_on_the_split_of_heads_or_batch_or_threads_on_cpu(dtype, seed):
    problem = Problem.random("conv-clip", group=2, batch=3, lengths=True, dropout_p=0.3, dim=40, dtype=DTYPES[dtype])
    whole = problem.on("cpu")
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3, 5):
            torch.set_num_threads(threads)
            same(problem.on("cpu"), whole)
            part = Problem(
                problem.pattern,
                [x[1:2, -x.shape[1] // 2 :] for x in problem.tensors],
                problem.grad[1:2, 2:],
                {
                    "text_lengths": problem.options["text_lengths"][1:2],
                    "dropout_p": 0.3,
                    "seed": problem.options["seed"][1:2],
                    "head_offset": 2,
                },
            )
            same(part.on("cpu"), [x[1:2, -x.shape[1] // 2 :] for x in whole])
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", DTYPES)
def test_options_that_change_nothing_keep_the_bits_on_cpu(dtype, seed):
    """Those of the float kernels: other ones may run without options in bfloat16."""
    problem = Problem.random("row", dtype=DTYPES[dtype])
    seeds = torch.arange(4)
    neutral = [dict(text_lengths=torch.full((4,), 13)), dict(dropout_p=2**-40, seed=seeds), dict(seed=7)]
    expected = problem.on("cpu")
    for options in neutral:
        ours = Problem(problem.pattern, problem.tensors, problem.grad, options).on("cpu")
        if dtype != "bfloat16":
            same(ours, expected)
        for a, b in zip(ours, expected):
            torch.testing.assert_close(a, b, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_text_that_does_not_exist_is_never_read(backend, seed):
    """Results and gradients of absent text are 0, and it may hold NaN."""
    problem = Problem.random("both ways", lengths=True, dropout_p=0.2)
    expected = problem.on(backend)
    absent = torch.arange(problem.pattern.seq_len) >= problem.options["text_lengths"][:, None]
    absent &= torch.arange(problem.pattern.seq_len) < 13
    for x in (*problem.tensors, problem.grad):
        x.masked_fill_(absent[:, None, :, None], torch.nan)
    ours = problem.on(backend)
    same(ours, expected)
    for name, x in zip(RESULTS, ours):
        hidden = x.transpose(1, 2)[absent]
        assert absent.any() and torch.equal(hidden, torch.full_like(hidden, -torch.inf if name == "lse" else 0))


def test_continuing_from_cached_keys(seed):
    """The rows of a whole pass, one chunk of queries at a time."""
    pattern = P.conv(9, (6, 7), 5)
    q, k, v = torch.randn(3, 2, 3, 51, 32)
    whole = dk.sparse_attention(q, k, v, pattern)
    for begin, end in ((0, 9), (9, 10), (10, 40), (40, 51)):
        part = dk.sparse_attention(q[:, :, begin:end], k[:, :, :end], v[:, :, :end], pattern)
        torch.testing.assert_close(part, whole[:, :, begin:end], rtol=1e-5, atol=1e-6)


# -- dropout


def test_how_many_pairs_are_dropped():
    n = 200
    q, k = torch.zeros(1, 2, n, 8), torch.zeros(1, 2, n, 8)
    pattern = P.from_mask(torch.ones(n, n, dtype=torch.bool), causal=False)
    for dropout_p in (0.1, 0.5):
        out = dk.sparse_attention(q, k, torch.ones_like(k), pattern, dropout_p=dropout_p, seed=3)
        kept = int((out[..., 0].double().sum() * n * (1 - dropout_p)).round())
        assert binomial_p(kept, 2 * n * n, 1 - dropout_p) > REJECT


def test_seeds(seed):
    q, k, v = torch.randn(3, 3, 2, 20, 8)
    pattern = P.row(4, (4, 4))

    def out(**options):
        return dk.sparse_attention(q, k, v, pattern, dropout_p=0.5, **options)

    assert torch.equal(out(seed=5), out(seed=5)) and not torch.equal(out(seed=5), out(seed=6))
    torch.manual_seed(1)
    first, second = out(), out()
    torch.manual_seed(1)
    assert torch.equal(out(), first) and not torch.equal(first, second)
    q[:], k[:], v[:] = q[:1].clone(), k[:1].clone(), v[:1].clone()
    rows = out(seed=5)  # an int gives every sequence a seed of its own
    assert not torch.equal(rows[0], rows[1]) and not torch.equal(rows[1], rows[2])
    shared = out(seed=torch.tensor([5, 5, 5]))
    assert torch.equal(shared[0], shared[1]) and torch.equal(shared[1], shared[2])


def test_compiles_into_one_graph(seed):
    pattern = P.row(4, (4, 4))
    q, k, v = torch.randn(3, 2, 2, 20, 16)
    lengths = torch.tensor([1, 3])

    def step(q, k, v, lengths, seed):
        options = dict(text_lengths=lengths, dropout_p=0.25, seed=seed)
        return dk.sparse_attention(q[:, :, -5:], k[:, :1], v[:, :1], pattern, **options).sin()

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for seeds in torch.tensor([[1, 2], [3, 4]]):
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        ours = torch.autograd.grad(compiled(*leaves, lengths, seeds).sum(), leaves)
        for a, b in zip(ours, torch.autograd.grad(step(*leaves, lengths, seeds).sum(), leaves)):
            torch.testing.assert_close(a, b)


# -- patterns that are not causal, and plans of some queries


def test_masks_that_are_not_causal(seed):
    mask = (torch.rand(30, 30) < 0.3).fill_diagonal_(True)
    pattern = P.from_mask(mask, 4, causal=False)
    assert not pattern.is_causal and torch.equal(pattern.dense(), mask) and pattern.nnz == int(mask.sum())
    assert pattern == pickle.loads(pickle.dumps(pattern)) and not pickle.loads(pickle.dumps(pattern)).is_causal
    assert pattern == P.from_mask_mod(lambda b, h, q, k: mask[q, k], 30, text_len=4, causal=False)
    assert P.from_mask(mask.tril(), causal=False).is_causal and P.row(4, (2, 2)).is_causal


@pytest.mark.parametrize("side", ["query", "key"])
@pytest.mark.parametrize("name", NAMES)
def test_plans_of_the_last_queries(name, side, seed):
    """A plan lists every allowed pair of a query from `first` on, and no other query."""
    pattern = patterns(7, (5, 6))[name]
    n, first = 33, 12
    plan = compile_plan(pattern, n, TileShape(32, 8), side, first)
    pairs = torch.zeros(n, n, dtype=torch.bool)
    for tile, rows in enumerate(plan.rows):
        for keys, groups, mask, _ in plan.entries[plan.begin[tile] : plan.begin[tile + 1]]:
            for g in range(groups):
                tokens = range(keys + 8 * g, keys + 8 * g + 8) if keys >= 0 else plan.gathered[~keys + g]
                for (r, row), (c, token) in itertools.product(enumerate(rows), enumerate(tokens)):
                    if row >= 0 and token >= 0 and (mask < 0 or plan.masks[mask, 0, c] >> r & 1):
                        pairs[(row, token) if side == "query" else (token, row)] = True
    expected = pattern.dense()[:n, :n].clone()
    expected[:first] = False
    assert torch.equal(pairs, expected)


# -- refusals

ROW = P.row(4, (2, 2))
X = torch.zeros(2, 4, 8, 16)


@pytest.mark.parametrize(
    ("keys", "options", "error", "message"),
    [
        (X[:, :3], {}, ValueError, r"heads of k and v must divide those of q; got \[2, 4, 8, 16\], \[2, 3, 8, 16\]"),
        (X[:, :0], {}, ValueError, "must divide those of q"),
        (X[:, :, :5], {}, ValueError, "queries must be the last.*another sequence, use scaled_dot_product_attention"),
        (X[:1], {}, ValueError, r"k and v \[B, K, N, D\]"),
        (X, {"dropout_p": 1.0}, ValueError, r"dropout_p must lie in \[0, 1\); got 1.0"),
        (X, {"dropout_p": -0.1}, ValueError, "got -0.1"),
        (X, {"dropout_p": float("nan")}, ValueError, "got nan"),
        (X, {"dropout_p": 0.1, "head_offset": -1}, ValueError, "head_offset must be.*got -1"),
        (X, {"dropout_p": 0.1, "seed": torch.zeros(3)}, ValueError, r"int64 tensor \[2\]"),
        (X, {"dropout_p": 0.1, "seed": 0.5}, TypeError, "got float"),
        (X, {"text_lengths": torch.tensor([1, 5])}, ValueError, r"lie in \[0, 4\].*got \[1, 5\]"),
        (X, {"text_lengths": torch.tensor([-1, 2])}, ValueError, r"got \[-1, 2\]"),
        (X, {"text_lengths": torch.tensor([1])}, ValueError, r"int64 tensor \[2\] on cpu; got torch.int64 \[1\]"),
        (X, {"text_lengths": torch.tensor([1.0, 2.0])}, ValueError, "got torch.float32"),
        (X, {"text_lengths": [1, 2]}, ValueError, "got list"),
    ],
)
def test_bad_options_are_refused(keys, options, error, message):
    with pytest.raises(error, match=message):
        dk.sparse_attention(X, keys, keys, ROW, **options)


@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_gpu_kernels_refuse_options(backend):
    with FakeTensorMode(allow_non_fake_inputs=True):
        x = torch.empty(1, 2, 8, 16, device="cuda")
        words = ("dropout", "grouped queries")
        (reason,) = backends.BACKENDS[backend].reasons("sparse_attention", x, words)
    assert reason == "it does not support dropout or grouped queries; 'cpu' and 'reference' do"


def test_a_cache_needs_causal_patterns():
    pattern = P.from_mask(torch.ones(8, 8, dtype=torch.bool), 4, causal=False)
    with pytest.raises(ValueError, match="patterns must be causal"):
        dk.DecodeCache([pattern], prompts=1, candidates=1, heads=1, head_dim=8, dtype=torch.float32)

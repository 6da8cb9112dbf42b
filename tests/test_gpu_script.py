"""`make gpu` without a GPU: its helpers, its handling of failures, and a dry run of every row on tiny sizes."""

import contextlib
import json
import math
import os
import subprocess
import sys
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from common.attention import in_order
from common.setting import ROOT, Setting, logged
from common.timing import Unavailable, quartiles
from gpu import (
    attention,
    bench,
    checks,
    compile,
    decode,
    gumbel,
    machine,
    main,
    model,
    report,
    sampling,
    small,
    suite,
    timing,
    tune,
)
from gpu.stages import STAGES, TOTAL, Budget, Stage, one_line, run_stage, work

import dalle_kernels as dk
from dalle.generation.sampler import sequence_bytes

TINY = Setting("cpu", tiny=True)


# -- numbers


def test_quartiles():
    assert quartiles([5]) == [5, 5, 5]
    assert quartiles([4, 1, 3, 2, 5, 7, 6]) == [2, 4, 6]
    assert quartiles(range(15)) == [3, 7, 11]


def test_ratios_are_of_the_same_round():
    rounds = [{"ours": (1.0, 2.0), "other": (3.0, 2.0)}, {"ours": (2.0, 4.0), "other": (6.0, 4.0)}]
    found = timing.ratios(rounds, ["ours", "missing"], ["other", "absent"])
    assert found == {"ours": {"other": {"warm": [3.0] * 3, "cold": [1.0] * 3}}}


def test_compare_records_what_cannot_be_had():
    def broken():
        raise ValueError("no\nsuch thing")

    def unavailable():
        raise Unavailable("needs more")

    calls = []
    ours = {"ours": lambda: lambda: calls.append(1), "declines": lambda: declines()}
    result = timing.compare(timing.HostTimer(), ours, {"broken": broken, "absent": unavailable})
    assert result["times"]["broken"] == {"unavailable": "ValueError: no such thing"}
    assert result["times"]["absent"] == {"unavailable": "needs more"}
    assert result["times"]["declines"]["unavailable"].startswith("backend 'cuda' cannot run sample_tokens here: ")
    assert result["ratios"] == {"ours": {}} and calls


def declines():
    return dk.sample_tokens(torch.zeros(1, 2), backend="cuda")


class StandIn:
    """The part of torch.cuda that the timer uses, with a clock that only measured functions advance."""

    def __init__(self, monkeypatch):
        self.now, self.capturing, self.broken = 0.0, False, False
        stream = SimpleNamespace(wait_stream=lambda other: None)
        graph = partial(StandInGraph, self)
        for name, value in dict(
            Stream=lambda: stream, current_stream=lambda: stream, stream=lambda s: contextlib.nullcontext(),
            Event=partial(StandInEvent, self), CUDAGraph=graph, synchronize=self.synchronize, empty_cache=lambda: None,
            memory_allocated=lambda: 1_000_000, max_memory_allocated=lambda: 4_000_000,
            reset_peak_memory_stats=lambda: None,
            get_device_properties=lambda: SimpleNamespace(L2_cache_size=50_000_000),
        ).items():  # fmt: skip
            monkeypatch.setattr(torch.cuda, name, value)
        self.flush = SimpleNamespace(add_=lambda x: self.spend(0.1))
        monkeypatch.setattr(timing.torch, "empty", lambda *shape, **options: self.flush)

    def spend(self, seconds):
        self.now += seconds

    def synchronize(self):
        if self.broken:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        if self.capturing:
            raise RuntimeError("operation not permitted when stream is capturing")


class StandInEvent:
    def __init__(self, device, enable_timing):
        self._device = device

    def record(self):
        self.at = self._device.now

    def synchronize(self):
        self._device.synchronize()

    def elapsed_time(self, end):
        return (end.at - self.at) * 1e3


class StandInGraph:
    def __init__(self, device):
        self._device = device

    def capture_begin(self):
        self._began, self._device.capturing = self._device.now, True

    def capture_end(self):
        self._seconds, self._device.now = self._device.now - self._began, self._began
        self._device.capturing = False

    def replay(self):
        self._device.spend(self._seconds)


def test_device_time(monkeypatch):
    device = StandIn(monkeypatch)
    timer = timing.CudaTimer()
    calls = []

    def waits():
        device.spend(4e-3)
        device.synchronize()

    def short():
        calls.append(1)
        device.spend(2e-4)

    result = timing.compare(timer, {"short": lambda: short}, {"waits": lambda: waits})
    times = result["times"]
    assert times["short"]["graph"] and times["short"]["peak MB"] == 3
    assert len(calls) == 3 + 1 + 10, "warm-up, a graph of one call, a graph of 2 ms"
    for kind in ("ms", "cold ms"):
        assert times["short"][kind] == pytest.approx([0.2] * 3) and times["waits"][kind] == pytest.approx([4.0] * 3)
    assert not times["waits"]["graph"] and "not permitted" in times["waits"]["why"]
    assert result["ratios"]["short"]["waits"]["cold"] == pytest.approx([20.0] * 3)


def test_a_lost_device_ends_the_comparison(monkeypatch):
    device = StandIn(monkeypatch)

    def breaks():
        device.broken = True
        device.synchronize()

    with pytest.raises(RuntimeError, match="illegal memory access"):
        timing.compare(timing.CudaTimer(), {"breaks": lambda: breaks}, {"fine": lambda: lambda: None})


def test_number():
    shown = [report.number(x) for x in (None, 3, 123456, 0.012345, 12.345, 1234.5)]
    assert shown == ["–", "3", "123456", "0.0123", "12.3", "1234"]


@pytest.mark.parametrize("most", [0, 1, 5, 97, 100, 103, 200])
def test_largest_that_fits(most):
    tried = []
    found = model.largest(100, lambda n: tried.append(n) or n <= most)
    assert found <= most and len(tried) <= 8
    if most >= 90:
        assert found >= min(most, 103) - 3


def test_estimate_of_candidates():
    prior = model.make_prior(TINY)
    for free in (0, 10**5, 10**8):
        most = model.most_by_estimate(prior, free)
        assert most * sequence_bytes(prior, max(1, most)) <= free
        assert (most + 1) * sequence_bytes(prior, most + 1) > free


def test_bytes_of_a_step():
    """Counted by hand: in the middle of an image, row attention reads all text and `width + 1` image keys."""
    pattern = dk.AttentionPattern.row(7, (6, 5))
    vector = 2 * 16 * 4
    one = decode.bytes_moved(pattern, 17, 1, heads=2, dim=16, element_size=4)
    assert one == (2 * 7 + 2 * 6 + 4) * vector  # 7 text and 6 image keys and values, q, k, v, out
    assert decode.bytes_moved(pattern, 17, 9, heads=2, dim=16, element_size=4) == (2 * 7 + 9 * (2 * 6 + 4)) * vector


def test_the_columns_pattern_in_its_order():
    """The pattern for FlexAttention if the tokens are ordered column by column."""
    pattern = dk.AttentionPattern.column(5, (6, 4))
    order = pattern.order()
    assert torch.equal(in_order(pattern).dense(), pattern.dense()[order][:, order])
    row = dk.AttentionPattern.row(5, (6, 4))
    assert in_order(row) == row


def test_sampling_baseline_keeps_what_it_should():
    logits = torch.tensor([[3.0, 2.0, 1.0, -9.0]]).expand(500, 4)
    assert sampling.plain(logits, top_k=2).unique().tolist() == [0, 1]
    assert sampling.plain(logits, top_p=0.6).unique().tolist() == [0]
    assert set(sampling.plain(logits).unique().tolist()) >= {0, 1, 2}


# -- stages


def test_budget():
    now = [0.0]
    budget = Budget(100, clock=lambda: now[0])
    assert budget.limit(30) == 30
    now[0] = 90
    assert budget.limit(30) == 10
    now[0] = 120
    assert budget.limit(30) == 0


def test_time_for_everything():
    assert TOTAL < 9 * 60
    names = [stage.name for stage in STAGES]
    assert names == ["machine", "build", "compile", "test", "bench", "model", "sanitize", "suite", "tune"]
    assert sum(stage.seconds for stage in STAGES[: names.index("model")]) < TOTAL
    assert len({stage.log for stage in STAGES}) + len(["gpu.json", "gpu.md", "two", "plots"]) <= 8


def test_work_goes_on_after_an_error():
    said, settled = [], []

    def fails():
        yield {"row": 1}
        raise RuntimeError("broke\ndown")

    items = [("a", fails), ("b", lambda: None), ("c", lambda: [{"row": 2}])]
    work(items, 0, lambda **message: said.append(message), lambda: settled.append(1))
    assert said == [
        {"items": ["a", "b", "c"]},
        {"begin": 0}, {"row": {"row": 1}}, {"error": "RuntimeError: broke down"},
        {"begin": 1},
        {"begin": 2}, {"row": {"row": 2}},
        {"end": True},
    ]  # fmt: skip
    assert settled == [1]
    said.clear()
    work(items, 2, lambda **message: said.append(message), lambda: None)
    assert said[1:] == [{"begin": 2}, {"row": {"row": 2}}, {"end": True}]


def test_one_line():
    assert one_line(ValueError("a\n  b")) == "ValueError: a b"
    assert len(one_line(ValueError("x" * 5000))) == 600


SCRIPT = """
import os, sys, time
sys.path.insert(0, {benchmarks!r})
from gpu.stages import work
def crash(): os.abort()
def hang(): time.sleep(100)
def fine(): return [dict(fine=1)]
def fails(): raise ValueError("wrong")
import json
def emit(**message): print(json.dumps(message), flush=True)
print("a line of the log", file=sys.stderr, flush=True)
work([(n, globals()[n.split()[0]]) for n in {items!r}], int(sys.argv[1]), emit, lambda: None)
"""


def staged(tmp_path, items, seconds=20.0, item_seconds=0.7):
    script = SCRIPT.format(benchmarks=str(ROOT / "benchmarks"), items=items)
    results = report.Results(tmp_path)
    stage = Stage("some", seconds, item_seconds, "log")
    run_stage(
        stage, seconds, lambda skip: [sys.executable, "-c", script, str(skip)], tmp_path / "log", results.begin("some")
    )
    assert json.loads((tmp_path / "gpu.json").read_text()) == results.data
    return results.data["stages"]["some"]


def test_a_crash_and_a_hang_cost_one_item_each(tmp_path):
    found = staged(tmp_path, ["fine 1", "crash", "fine 2", "hang", "fails", "fine 3"], item_seconds=2.0)
    assert list(found) == ["fine 1", "crash", "fine 2", "hang", "fails", "fine 3"]
    for name in ("fine 1", "fine 2", "fine 3"):
        assert found[name]["rows"] == [{"fine": 1}] and "error" not in found[name], found
    assert "ended with exit status -6" in found["crash"]["error"] and "a line of the log" in found["crash"]["error"]
    assert found["hang"]["error"] == "stopped: the item took longer than 2 s"
    assert found["fails"]["error"] == "ValueError: wrong"
    page = (tmp_path / "gpu.md").read_text()
    assert "| some | 6 | 3 |" in page and "- some, fails: ValueError: wrong" in page


def test_a_stage_that_takes_too_long(tmp_path):
    found = staged(tmp_path, ["fine 1", "hang", "fine 2"], seconds=1.5, item_seconds=60.0)
    assert found["fine 1"]["rows"] == [{"fine": 1}]
    assert found["hang"]["error"].startswith("stopped: the stage took longer than ")
    assert found["fine 2"]["error"] == "not reached"


def test_a_stage_that_cannot_start(tmp_path):
    results = report.Results(tmp_path)
    command = [sys.executable, "-c", "raise SystemExit('no such module')"]
    run_stage(Stage("some", 9, 9, "log"), 9, lambda skip: command, tmp_path / "log", results.begin("some"))
    assert results.data["stages"]["some"]["some"]["error"] == "the process ended with exit status 1; no such module"


def test_a_command_that_fails(capfd):
    with pytest.raises(RuntimeError, match=r"gave exit status 3:\nlast words"):
        logged([sys.executable, "-c", "print('last words'); raise SystemExit(3)"])
    assert "last words" in capfd.readouterr().out


# -- the script


def script(*arguments, **environment):
    command = [sys.executable, str(ROOT / "benchmarks/run_gpu.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment})


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_refuses_without_a_gpu(tmp_path):
    result = script(OUT=str(tmp_path / "out"))
    assert result.returncode == 2 and not result.stdout and not (tmp_path / "out").exists()
    assert result.stderr.startswith("make gpu needs an NVIDIA GPU, and torch ") and result.stderr.count("\n") == 1


def test_names_an_unknown_stage(capsys):
    with pytest.raises(SystemExit):
        main.main(["--stages", "bench,tests"])
    assert "there is no stage 'tests'; the stages are build, compile, test," in capsys.readouterr().err


def test_dry_run_of_the_script(tmp_path):
    """Processes, files and exit status."""
    result = script("--device", "cpu", "--tiny", "--stages", "sanitize", OUT=str(tmp_path), OMP_NUM_THREADS="1")
    assert result.returncode == 1, result.stderr
    data = json.loads((tmp_path / "gpu.json").read_text())
    assert list(data["stages"]) == ["machine", "sanitize"]
    assert data["stages"]["machine"]["machine"]["rows"][0]["packages"]["torch"] == torch.__version__
    broken = {(stage, item) for stage, item, _ in report.failures(data)}
    assert broken == {("sanitize", "cpu: memcheck"), ("sanitize", "cpu: racecheck")}
    assert result.stdout.endswith((tmp_path / "gpu.md").read_text() + "\n")
    assert len(list(tmp_path.iterdir())) <= 8


EXPECTED = {"cuDNN causal": "needs CUDA", "flash causal": "needs CUDA",
            "F.gumbel_softmax compiled": "is compared on CUDA only"}  # fmt: skip


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_dry_run_of_the_benchmarks(tmp_path):
    """Every row runs, except those that need CUDA."""
    torch.manual_seed(0)
    results = report.Results(tmp_path)
    record = results.begin("bench")
    for name, function in bench.items(TINY):
        for row in function():
            json.dumps(row)
            record(name, row=row)
            for column, times in row.get("times", {}).items():
                if "unavailable" in times:
                    backward = column.startswith("FlexAttention") and row["pass"] == "backward"
                    assert times["unavailable"] == EXPECTED.get(column) or backward, (name, column, times)
                else:
                    assert 0 < times["ms"][0] <= times["ms"][1] and times["cold ms"][1] > 0
                    assert all(value["warm"][1] > 0 for value in row["ratios"]["cpu"].values())
    rows = [row for entry in results.data["stages"]["bench"].values() for row in entry["rows"]]
    operations = {row["op"] for row in rows if "op" in row}
    assert operations == {"sparse_attention", "gumbel_softmax", "sample_tokens", "decode_attention"}
    page = (tmp_path / "gpu.md").read_text()
    assert "## sparse_attention, backward" in page and "FlexAttention ordered" in page and "padded SDPA / cpu" in page
    for line in page.splitlines():
        assert not line.startswith("|") or line.count("|") > 2
    report.plot(results.data, tmp_path)
    assert (tmp_path / "attention.png").stat().st_size > 5000 and (tmp_path / "bandwidth.png").stat().st_size > 5000


def test_dry_run_of_the_model():
    rows = [row for name, function in model.items(TINY) if "most" not in name for row in function()]
    assert rows[0]["parameters"] == sum(p.numel() for p in model.make_prior(TINY).parameters())
    for row, candidates in zip(rows[1:], (1, 2)):
        assert (row["backend"], row["candidates"]) == ("cpu", candidates)
        assert math.isclose(row["tokens/s"], candidates / row["ms per step"] * 1e3)
        assert math.isclose(row["of that time"], row["ms per step"] / row["ms to read them"])


def test_dry_run_of_the_other_stages():
    described = machine.describe(TINY)
    assert described["packages"]["torch"] == torch.__version__ and described["tools"]["c++"]
    assert machine.tool("no-such-tool") is None
    small.run("cpu", "cpu")


def test_the_suite(monkeypatch, capfd):
    monkeypatch.setattr(suite, "FILES", ("test_ph*.py", "test_statistics.py"))
    monkeypatch.setattr(suite, "PROCESSES", 2)
    assert suite.suite(TINY) == [{"files": ["tests/test_philox.py", "tests/test_statistics.py"]}]
    assert " passed" in capfd.readouterr().out


def test_lines_of_the_launch_table(monkeypatch, tmp_path):
    """The lines as the command prints them; all operations are tuned."""
    pytest.importorskip("triton")
    from dalle_kernels import tune as command

    monkeypatch.setattr(tune, "python", lambda *arguments: [sys.executable, "-c", f"print({arguments!r})"])
    results = report.Results(tmp_path)
    record = results.begin("tune")
    for name, function in tune.items(TINY):
        for row in function():
            record(name, row=row)
            module, *arguments = eval(row["launch table"][0])[1:]
            assert module == command.__name__ and arguments == [name, *tune.SHORT]
    assert sorted(results.data["stages"]["tune"]) == sorted(command.OPERATIONS)
    assert (tmp_path / "gpu.md").read_text().count("```python\n('-m',") == len(command.OPERATIONS)


def test_everything_is_compiled(monkeypatch):
    """All benchmarks without their baselines, and all checks except the largest."""
    started = set()
    for name in ("sparse_attention", "gumbel_softmax", "sample_tokens", "decode_attention"):
        function = getattr(dk, name)
        monkeypatch.setattr(dk, name, lambda *a, n=name, f=function, **o: started.add(n) or f(*a, **o))
    all_checks = [name for name, _ in checks.items(Setting("cpu"))]
    monkeypatch.setattr(checks, "items", lambda setting: [(name, None) for name in all_checks])
    monkeypatch.setattr(torch.nn.functional, "gumbel_softmax", None)
    functions = compile.everything(TINY)
    assert functions.count(None) == len([name for name in all_checks if compile.LARGE not in name])
    rows = [function() for function in filter(None, functions)]
    assert rows.count(None) == len(["small"])
    assert all([row["times"] for row in found] == [{}] for found in rows if found is not None)
    assert len(started) == 4


def test_parts_of_what_is_compiled(monkeypatch):
    done = []
    functions = [lambda: 1 / 0, *(partial(done.append, i) for i in range(7))]
    monkeypatch.setattr(compile, "everything", lambda setting: functions)
    for part in range(3):
        compile.run(TINY, part, 3)
    assert sorted(done) == list(range(7))


def test_compiling_ends_in_time(monkeypatch):
    codes = ["", "raise SystemExit(1)", "import time; time.sleep(100)"]
    monkeypatch.setattr(compile, "python", lambda *arguments: [sys.executable, "-c", codes[int(arguments[3])]])
    assert compile.compile_kernels(TINY, parts=3, seconds=2.0) == [{"processes": 3, "that finished": 1}]


def test_a_process_that_compiles():
    command = [sys.executable, "-m", "gpu.compile", "cpu", "0", "1000", "tiny"]
    subprocess.run(command, check=True, env=main.environment())


# -- the contents of full runs


def cases_of(setting):
    parts = [module.items(setting, None, 1.0) for module in (attention, gumbel, decode, sampling)]
    return [name for part in parts for group in part.values() for name, _ in group]


def test_the_matrix():
    short, long = cases_of(Setting()), cases_of(Setting(long=True))
    assert len(short) == len(set(short)) and len(long) == len(set(long)) and set(short) < set(long)
    for pattern in ("row", "column", "conv"):
        for direction in ("forward", "backward"):
            for what in ("32x32 dim 64 batch 1 ", "32x32 dim 64 batch 64 ", "32x32 dim 128 ", "64x64 dim 64 "):
                assert any(name.startswith(f"attention {direction} {pattern} {what}") for name in short), what
        assert f"attention {pattern} FlexAttention raster" in short
        for candidates in (1, 8, 64, 512):
            assert f"decode {pattern} {candidates} candidates bfloat16" in short
    assert "attention column FlexAttention ordered" in short
    assert "attention backward conv 64x64 dim 128 batch 64 float32" in long


def test_the_results_page_claims_nothing():
    page = (ROOT / "benchmarks/results/gpu.md").read_text()
    assert "not measured yet" in page.lower() or (ROOT / "benchmarks/results/gpu.json").exists()

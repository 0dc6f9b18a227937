"""The comparison compares like with like: every contender that is installed takes the same steps as ours."""

import json

import numpy as np
import pytest

from adamw_numba import AdamW
from benchmarks import compare, contenders, model, report, workloads

SHAPES = [(40, 3), (7,), (1,)]
ON_JAX = {name: contenders.PROCESSES["jax"][name] for name in ("optax", "ours, optax front")}
HERE = contenders.PROCESSES["torch"] | ON_JAX  # the tests have Keras on torch


@pytest.mark.parametrize("option", workloads.OPTIONS)
@pytest.mark.parametrize("name", HERE)
def test_contenders_do_the_same_work(name, option):
    given, start = workloads.gradients(SHAPES, option), workloads.values(SHAPES)
    step = workloads.step_of(option, given)
    try:
        other = HERE[name](start, step)
    except (contenders.Unable, contenders.Absent) as reason:
        pytest.skip(str(reason))
    rounded = compare.ROUNDED.get(name, 0.0)
    assert compare.agree(contenders.ours(start, step), other, given, step, rounded) < 1e-2
    assert name == "limit" or not np.array_equal(other.look()[0], start[0])


@pytest.mark.parametrize("change", [{"learning_rate": 1.1e-3}, {"weight_decay": 0.1}, {"global_clipnorm": 1e-9}])
def test_other_work_is_noticed(change, monkeypatch):
    given, start = workloads.gradients(SHAPES, "plain"), workloads.values(SHAPES)
    ours = contenders.ours(start, workloads.Step())
    monkeypatch.setattr(contenders, "AdamW", lambda **options: AdamW(**options | change))
    with pytest.raises(AssertionError, match="same work"):
        compare.agree(contenders.ours(start, workloads.Step()), ours, given, workloads.Step())


@pytest.mark.parametrize(
    ("name", "arrays", "parameters"),
    [("resnet50", 161, 25_557_032), ("gpt2", 148, 124_439_808), ("mlp", 6, 55_050), ("many-small", 1000, 100_000)],
)
def test_workloads(name, arrays, parameters):
    assert (len(workloads.WORKLOADS[name]), workloads.elements(workloads.WORKLOADS[name])) == (arrays, parameters)


def test_turns(monkeypatch):
    """Each turn is some calls that do not count, for as long as other threads may spin, and one that does."""
    calls, clock = [], iter(range(1000))
    monkeypatch.setattr(workloads.time, "perf_counter", lambda: next(clock))
    monkeypatch.setattr(workloads, "SETTLING", 2)
    times = workloads.interleaved({k: lambda counts, k=k: calls.append((k, counts)) or 1.0 for k in "ab"}, 0.0, least=2)
    assert calls == [(k, counts) for _ in range(2) for k in "ab" for counts in (False, True)]
    assert times == {"a": [1.0, 1.0], "b": [1.0, 1.0]}


def test_the_model_finds_its_constants():
    """From exact times of known constants."""
    rates = np.array([4e-6, 1e-7, 5e-8, 2e-6, 1 / 40e9, 1 / 90e9, 1 / 60e9, 1 / 20e9])
    points = [(1, n) for n in compare.SWEEP] + [(count, 100) for count in compare.COUNTS]
    sweep = [{"sweep": [k, n], "ours": float(np.dot(model._terms(k, k * n), rates))} for k, n in points]
    found = model.fit(sweep, [{"workload": "mlp", "option": "plain", "gradients": "same", "ours": 1.0}])
    assert [*found["seconds"].values()] == pytest.approx(rates[:4], rel=1e-6)
    assert [*found["bytes per second"].values()] == pytest.approx(1 / rates[4:], rel=1e-6)
    expected = 4e-6 + 6e-7 + 2e-6 + 28 * 55_050 / 90e9
    assert found["workloads"]["mlp"]["predicted"] == pytest.approx(expected, rel=1e-6)


def test_a_later_run_of_some_workloads():
    def row(workload, contender, ratio):
        return {
            "workload": workload,
            "option": "plain",
            "contender": contender,
            "gradients": "same",
            "ratio": ratio,
            "ours": 1e-5,
        }

    machine = {"machine": {}, "sweep": [{"sweep": [1, n], "ours": n * 1e-9} for n in compare.SWEEP], "absent": {}}
    old = machine | {
        "command": "all",
        "rows": [row("one-10", "NumPy", 1), row("mlp", "NumPy", 2), row("mlp", "optax", 3)],
    }
    new = machine | {"command": "some", "rows": [row("gpt2", "NumPy", 4), row("mlp", "NumPy", 5)], "sweep": []}
    found = compare.merged(old | {"costs": 7, "absent": {"x": "why", "NumPy": "why"}}, new)
    assert [(r["workload"], r["contender"], r["ratio"]) for r in found["rows"]] == [
        ("one-10", "NumPy", 1), ("mlp", "NumPy", 5), ("mlp", "optax", 3), ("gpt2", "NumPy", 4),
    ]  # fmt: skip
    assert (found["command"], found["costs"], found["absent"], found["sweep"]) == (
        "all; some",
        7,
        {"x": "why"},
        old["sweep"],
    )
    assert set(found["model"]["workloads"]) == {"one-10", "mlp", "gpt2"}


REFUSED = {
    "--seconds 0": "> 0",
    "--seconds nan": "> 0",
    "--json {tmp}/none/run.json": "a folder that exists",
    "--json {tmp}": "expected a file",
    "--seconds x": "> 0",
    "--plot {tmp}/plot.png": "ends in .svg",
    "--plot {tmp}/plot.svg --workload mlp": "add --sweep",
    "--json {tmp}/old.json --into {tmp}/../{name}/old.json": "two files",
    "--into {tmp}/missing.json": "cannot be read",
    "--into {tmp}/other.json": "is not what",
    "--into {tmp}/old.json": "another machine",
}


@pytest.mark.parametrize("line", REFUSED)
def test_refused_before_anything_is_measured(line, tmp_path, monkeypatch, capsys):
    old = {"machine": {"processor": "another"}, "command": "", "rows": [], "sweep": [], "absent": {}}
    (tmp_path / "old.json").write_text(json.dumps(old))
    (tmp_path / "other.json").write_text("[1]")
    monkeypatch.setattr(compare, "run", lambda _: pytest.fail("measured"))
    with pytest.raises(SystemExit) as refusal:
        compare.main(line.format(tmp=tmp_path, name=tmp_path.name).split())
    assert REFUSED[line] in f"{refusal.value}{capsys.readouterr().err}"


@pytest.mark.parametrize(
    ("found", "expected"),
    [(None, "cannot be read"), ({}, "is not what"), ({"machine": {}, "command": "", "rows": 3, "sweep": [], "absent": {}}, "is not what"), ({"machine": {}, "command": "", "rows": [], "sweep": [1], "absent": {}}, "lacks plain")],
)  # fmt: skip
def test_a_page_of_part_of_a_run(found, expected, tmp_path):
    file = tmp_path / "run.json"
    if found is not None:
        file.write_text(json.dumps(found))
    before = (report.DOCS / "benchmarks.md").read_text()
    with pytest.raises(SystemExit, match=expected):
        report.main([str(file)])
    assert (report.DOCS / "benchmarks.md").read_text() == before


def test_tables_of_a_part(tmp_path, capsys):
    row = {"workload": "mlp", "option": "clip", "contender": "NumPy", "gradients": "same", "ours": 1e-5, "ratio": 2.5}
    file = tmp_path / "run.json"
    file.write_text(json.dumps({"machine": {}, "command": "", "rows": [row], "sweep": [], "absent": {}}))
    assert report.main(["--show", str(file)]) == 0
    shown = capsys.readouterr().out
    assert "clip: ours" in shown
    assert "| **ours** | 10 us |\n| NumPy | 2.50 |" in shown


@pytest.mark.parametrize(
    ("line", "reason"),
    [("--workload mlp --option 16-bit --contender NumPy", "NumPy has no bfloat16"), ("--quick --workload gpt2 --contender NumPy", "leaves out")],
)  # fmt: skip
def test_nothing_to_measure(line, reason):
    with pytest.raises(SystemExit, match=reason):
        compare.main(line.split())


def test_processes(monkeypatch):
    """One for each workload and framework, and only those that hold a chosen contender; all at once where it is quick."""
    started = []
    monkeypatch.setattr(compare, "_run_worker", lambda found, *command: started.append(command))
    compare.run(compare.parse(["--workload", "mlp", "--workload", "gpt2", "--contender", "optax"]))
    compare.run(compare.parse(["--quick", "--workload", "mlp", "--workload", "gpt2"]))
    compare.run(compare.parse(["--option", "plain", "--workload", "mlp", "--sweep"]))
    common = ["--seconds", "4.0"]
    assert started == [
        ("jax", [*common, "--contender", "optax", "--workload", "gpt2"]),
        ("jax", [*common, "--contender", "optax", "--workload", "mlp"]),
        ("torch", [*common, "--quick", "--workload", "mlp", "--workload", "gpt2"]),
        ("jax", [*common, "--quick", "--workload", "mlp", "--workload", "gpt2"]),
        ("torch", [*common, "--option", "plain", "--workload", "mlp"]),
        ("jax", [*common, "--option", "plain", "--workload", "mlp"]),
        ("torch", [*common, "--option", "plain", "--sweep"]),
    ]


def test_the_page_has_a_place_for_every_part():
    row = {"workload": "mlp", "contender": "NumPy", "gradients": "same", "ours": 1e-5, "theirs": 2e-5, "ratio": 2.0,
           "low": 1.5, "high": 2.5, "rounds": 3}  # fmt: skip
    found = {
        "machine": report.machine(),
        "command": "a command",
        "absent": {"DeepSpeed CPUAdam": "why"},
        "rows": [row | {"option": option} for option in workloads.OPTIONS] + [row | {"option": "plain", "gradients": "fresh"}],
        "costs": {"import": {"numpy": 0.1, "adamw_numba": 0.02}, "first step": {"cold": {"build": 1.0, "apply": 2.0}, "warm": {"build": 0.1, "apply": 0.2}}, "compile": {"norm": 0.3}},
        "model": {"seconds": {"step": 1e-6}, "bytes per second": {"memory": 2e10}, "workloads": {"mlp": {"measured": 2.0, "predicted": 2.1}}},
    }  # fmt: skip
    page = report.render((report.DOCS / "benchmarks.md").read_text(), report.sections(json.loads(json.dumps(found))))
    for text in (
        "| NumPy | 2.00 |",
        "Not installed: DeepSpeed CPUAdam",
        "predicted 2.1 s (+5%)",
        "2.00 (1.50 to 2.50)",
    ):
        assert text in page
    assert report.render(page, report.sections(found)) == page


def gpu_benchmark():
    pytest.importorskip("torch")
    from benchmarks import gpu

    return gpu


class Rows:
    """An optimizer whose captured step does nothing once its coefficients run out."""

    def __init__(self):
        self.iterations, self.rows = 1, 0

    def update_hyperparameters(self, steps):
        self.rows = steps

    def replay(self):
        self.iterations += self.rows > 0
        self.rows -= 1


@pytest.mark.parametrize("forgotten", [0, 1])
def test_replays_on_a_gpu_are_counted(forgotten, monkeypatch):
    """Coefficients are sent for all of them, and one that did nothing is an error."""
    gpu = gpu_benchmark()

    def timed(call, count):
        for _ in range(count):
            call()
        return 0.1

    monkeypatch.setattr(gpu, "timed", timed)
    optimizer = Rows()
    steps = gpu.Steps(optimizer, optimizer.replay, captured=True)
    send = steps.prepare
    steps.prepare = lambda n: send(n - forgotten)
    contenders = {"adamw_numba": steps, "another": lambda: None}
    if forgotten:
        with pytest.raises(RuntimeError, match=r"took \d+ of 664 timed steps; expected all of them"):
            gpu.interleaved(contenders, 3)
    else:
        times = gpu.interleaved(contenders, 3)
        assert times == dict.fromkeys(["from idle", "in a row"], dict.fromkeys(contenders, [0.1] * 3))
        assert optimizer.iterations == 1 + 4 + 3 * (20 + 200)
        assert optimizer.rows == 0


@pytest.mark.slow
def test_the_gpu_benchmark_without_a_gpu(monkeypatch, tmp_path, capsys):
    """All of it, with a step's call in place of its capture and no clock, on small arrays of the host."""
    gpu = gpu_benchmark()

    taken = []

    def timed(call, count):
        call()
        taken.append(call)
        return 1.0

    small = {"resnet50": [(7, 3)] * 5, "gpt2": [(7, 3), (5,)], "mlp": [(4,)]}
    for name, value in {"DEVICE": "cpu", "MILLION": 60, "timed": timed, "WORKLOADS": small}.items():
        monkeypatch.setattr(gpu, name, value)
    monkeypatch.setattr(gpu, "captured", lambda step: step)
    monkeypatch.setattr(gpu, "describe", lambda argv: f"a machine\n{argv}")
    monkeypatch.setattr(gpu.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu.torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(gpu, "on_cupy", lambda sizes: {})
    file = tmp_path / "run.json"
    gpu.main(["--quick", "--turns", "3", "--json", str(file)])
    found = json.loads(file.read_text())["milliseconds"]
    assert {"16M float32", "resnet50, in a graph", "gpt2: clip, AMSGrad, average", "host, 1000 arrays"} < set(found)
    for name, times in found.items():
        for measured in [times] if name.startswith("host") else times.values():
            assert "adamw_numba" in measured
            assert len(measured) >= 2
    assert "host time of a step, 10 arrays" in capsys.readouterr().out
    assert taken


@pytest.mark.parametrize(
    ("line", "expected"), [("--help", "--turns"), ("--turns 2", "at least 3"), ("--quick", "no GPU here")]
)
def test_the_gpu_benchmark_says_what_it_expects(line, expected, monkeypatch, capsys):
    gpu = gpu_benchmark()

    monkeypatch.setattr(gpu.torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as refusal:
        gpu.main(line.split())
    shown = capsys.readouterr()
    assert expected in f"{refusal.value}{shown.out}{shown.err}"


def test_a_process_that_ends_leaves_what_others_have_measured(capfd):
    found = {"rows": [{"kept": True}], "ended": []}
    compare._run_worker(found, "torch", ["--seconds", "none"])
    assert found["rows"] == [{"kept": True}]
    assert found["ended"] == ["the process of torch ended with status 2: --seconds none"]
    assert found["ended"][0] in capfd.readouterr().err

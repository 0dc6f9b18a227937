"""A step on a GPU next to torch's: `python -m benchmarks.gpu` (needs numba-cuda, torch with CUDA; CuPy if installed).

All times are measured with events, in one process, with the contenders taking turns, in two ways. *In a row* is what a
loop sees: at least 20 steps, one behind the other, so the host's time counts wherever it is the longer. *From idle* is
a few steps that begin on a GPU with nothing to do. It prints ratios of medians, with the quartiles of the ratios of
single turns. Steps that do nothing would be fast, so ours are counted, and a wrong count is an error. `--quick` uses
smaller arrays; `--json FILE` saves all the times.
"""

import argparse
import importlib.metadata
import itertools
import json
import platform
import statistics
import sys
import time

import numpy as np
import torch

from adamw_numba import AdamW
from benchmarks.workloads import WORKLOADS

DEVICE = "cuda"
IN_A_ROW = 20  # steps, at least
MILLION = 2**20
LARGE = {"64M": 64 * MILLION, "256M": 256 * MILLION}


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="16M elements instead of 64M and 256M")
    parser.add_argument("--turns", type=int, default=15, help="times that each contender is timed (default: 15)")
    parser.add_argument("--json", metavar="FILE", help="write every time, in milliseconds")
    argv = sys.argv[1:] if argv is None else argv
    options = parser.parse_args(argv)
    if options.turns < 3:
        parser.error(f"--turns is {options.turns}; expected at least 3")
    if not torch.cuda.is_available():
        sys.exit("torch finds no GPU here; expected one, and torch built for CUDA")
    machine = describe(argv)
    print(machine, flush=True)
    results = measure({"16M": 16 * MILLION} if options.quick else LARGE, options.turns)
    if options.json:
        with open(options.json, "w") as file:
            json.dump({"machine": machine, "milliseconds": results}, file, indent=1)


def measure(sizes, turns):
    """Every workload, one after the other; prints the ratios and returns the times."""
    results = {}
    for name, make, bar in workloads(sizes):
        torch.cuda.empty_cache()
        try:
            contenders = make()
        except torch.cuda.OutOfMemoryError:
            print(f"{name:44} does not fit into this GPU's memory")
            continue
        times = interleaved(contenders, turns)
        results[name] = times
        report(name, times, bar)
        del contenders
    for count in (1, 10, 100, 1000):
        times = host_times(count, turns)
        results[f"host, {count} arrays"] = times
        ours, theirs = (1e3 * statistics.median(times[key]) for key in ("adamw_numba", "torch fused"))
        label = f"host time of a step, {count} arrays of 100"
        print(f"{label:44} {ours:8.1f} us; torch fused {theirs:8.1f} us  (bar: 20 us)")
    return results


def describe(argv):
    """The device, the versions and the command, without which a figure means nothing."""
    packages = ("adamw-numba", "numba", "numba-cuda", "torch", "cupy-cuda13x", "cupy-cuda12x")
    versions = []
    for package in packages:
        try:
            versions.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return (
        f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}; Python {platform.python_version()}, "
        f"{', '.join(versions)}\ncommand: python -m benchmarks.gpu {' '.join(argv)}"
    )


class Steps:
    """The steps of one of our optimizers, eager or replayed, which are counted on both sides.

    Parameters
    ----------
    optimizer : AdamW
        Built; whatever it has counted so far is no step of these.
    step : callable
        Takes one.
    captured : bool
        Whether `step` replays a graph, which does nothing once the coefficients that were sent run out.
    """

    def __init__(self, optimizer, step, captured=False):
        self._optimizer, self._step, self._captured = optimizer, step, captured
        self._before, self._taken = optimizer.iterations, 0

    def __call__(self):
        self._step()
        self._taken += 1

    def prepare(self, steps):
        """Send what the next steps need."""
        if self._captured:
            self._optimizer.update_hyperparameters(steps)

    def check(self):
        """Raise an error if steps were not taken; waits for the GPU."""
        found = self._optimizer.iterations - self._before
        if found != self._taken:
            raise RuntimeError(f"adamw_numba took {found} of {self._taken} timed steps; expected all of them")


def interleaved(contenders, turns):
    """Milliseconds per way of timing, contender and turn."""
    counts = {}
    for name, call in contenders.items():
        _prepare(call, 4)
        for _ in range(3):
            call()
        fill = int(2 / max(timed(call, 1), 1e-3))  # two milliseconds
        counts[name] = {"from idle": max(1, fill), "in a row": max(IN_A_ROW, 10 * fill)}
        _prepare(call, turns * sum(counts[name].values()))
    times = {way: {name: [] for name in contenders} for way in ("from idle", "in a row")}
    for turn in range(turns):
        for name in list(contenders) if turn % 2 else list(contenders)[::-1]:
            for way, count in counts[name].items():
                times[way][name].append(timed(contenders[name], count))
    _check(contenders)
    return times


def _prepare(call, steps):
    if isinstance(call, Steps):
        call.prepare(steps)


def _check(contenders):
    for call in contenders.values():
        if isinstance(call, Steps):
            call.check()


def timed(call, repeats):
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    start.record()
    for _ in range(repeats):
        call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / repeats


def report(name, times, bar):
    for way, measured in times.items():
        ours = np.array(measured["adamw_numba"])
        for other, theirs in measured.items():
            if other != "adamw_numba":
                low, high = np.quantile(np.array(theirs) / ours, [0.25, 0.75])
                ratio = statistics.median(theirs) / statistics.median(ours)
                want = f"  (bar: {bar[other]})" if other in bar else ""
                label = f"{name:36} {way:10} {1e3 * statistics.median(ours):10.1f} us; {other}"
                print(f"{label:86} / ours = {ratio:6.2f}  [{low:.2f}, {high:.2f}]{want}", flush=True)


def workloads(sizes):
    """Name, a function that makes the contenders, and the bars for their times divided by ours."""
    for label, n in sizes.items():
        yield (
            f"{label} float32",
            lambda n=n: plain(n, torch.float32, 28),
            {"copy of the bytes": 0.9, "torch fused": 1.0},
        )
        yield f"{label} bfloat16 (30 bytes)", lambda n=n: plain(n, torch.bfloat16, 30), {"copy of the bytes": 0.9}
    for label in ("gpt2", "resnet50", "mlp"):
        yield label, lambda label=label: several(WORKLOADS[label]), {}
        yield f"{label}: clip, AMSGrad, average", lambda label=label: full(WORKLOADS[label]), {}
    first = next(iter(sizes.values()))
    yield "clip, AMSGrad, average", lambda: full([first]), {"torch composed": 1.3}
    yield "clip, AMSGrad, average, 300 arrays", lambda: full([first // 300] * 300), {"torch composed": 1.3}
    yield "1,000 arrays of 1,000", lambda: several([1000] * 1000), {"torch fused": 4}
    yield "one array of 65,536", lambda: several([65536]), {"torch fused": 2}
    yield "one array of 65,536, in a graph", lambda: in_graphs([65536]), {"torch fused": 2}
    yield "1,000 arrays of 1,000, in a graph", lambda: in_graphs([1000] * 1000), {"torch fused": 2}
    for label in ("resnet50", "mlp"):
        yield f"{label}, in a graph", lambda label=label: in_graphs(WORKLOADS[label]), {}


def arrays(sizes, dtype=torch.float32):
    """Parameters with gradients: of so many elements, or of such shapes."""
    parameters = [torch.nn.Parameter(torch.randn(n, device=DEVICE, dtype=dtype)) for n in sizes]
    for p in parameters:
        p.grad = torch.randn_like(p)
    return parameters


def ours(parameters, **options):
    return Steps(*built(parameters, **options))


def built(parameters, **options):
    """Our optimizer, and what takes a step."""
    optimizer = AdamW(1e-3, weight_decay=0.01, epsilon=1e-8, **options)
    optimizer.build(parameters)
    gradients = [p.grad for p in parameters]
    return optimizer, lambda: optimizer.apply(gradients)


def fused(parameters, **options):
    return torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.01, fused=True, **options).step


def plain(n, dtype, bytes_per_element):
    """One large array: our step, a copy of as many bytes on the device (half read, half written), and torch's step."""
    source = torch.empty(n * bytes_per_element // 2, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    contenders = {"adamw_numba": ours(arrays([n], dtype)), "copy of the bytes": lambda: target.copy_(source)}
    if dtype is torch.float32:
        contenders["torch fused"] = fused(arrays([n]))
    return contenders


def full(sizes):
    parameters = arrays(sizes)
    step = fused(parameters, amsgrad=True)
    averages = [p.detach().clone() for p in parameters]

    def composed():
        torch.nn.utils.clip_grad_norm_(parameters, 1.0, foreach=True)
        step()
        torch._foreach_lerp_(averages, [p.detach() for p in parameters], 0.01)

    return {
        "adamw_numba": ours(arrays(sizes), global_clipnorm=1.0, amsgrad=True, use_ema=True),
        "torch composed": composed,
    }


def several(sizes):
    return {"adamw_numba": ours(arrays(sizes)), "torch fused": fused(arrays(sizes))} | on_cupy(sizes)


def on_cupy(sizes):
    """Our step on CuPy arrays, in torch's stream, if CuPy is installed."""
    try:
        import cupy
    except ImportError:
        return {}
    variables = [cupy.random.standard_normal(n, dtype=np.float32) for n in sizes]
    gradients = [cupy.random.standard_normal(n, dtype=np.float32) for n in sizes]
    optimizer = AdamW(1e-3, weight_decay=0.01, epsilon=1e-8)
    optimizer.build(variables)
    stream = cupy.cuda.ExternalStream(torch.cuda.current_stream().cuda_stream)

    def step():
        with stream:
            optimizer.apply(gradients)

    return {"adamw_numba on CuPy arrays": Steps(optimizer, step)}


def in_graphs(sizes):
    """The captured steps alone, without host time."""
    optimizer, step = built(arrays(sizes))
    replay = captured(step)
    return {
        "adamw_numba": Steps(optimizer, replay, captured=True),
        "torch fused": captured(fused(arrays(sizes), capturable=True)),
    }


def captured(step):
    """What replays a step, which is captured after some eager ones."""
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def host_times(count, turns):
    """Milliseconds until the call returns, starting with an idle GPU."""
    contenders = {"adamw_numba": ours(arrays([100] * count)), "torch fused": fused(arrays([100] * count))}
    for call, _ in itertools.product(contenders.values(), range(5)):
        call()
    times = {name: [] for name in contenders}
    for _ in range(3 * turns):
        for name, call in contenders.items():
            torch.cuda.synchronize()
            start = time.perf_counter()
            call()
            times[name].append(1e3 * (time.perf_counter() - start))
    _check(contenders)
    return times


if __name__ == "__main__":
    main()

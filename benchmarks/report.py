"""The results of a run: as text, as a plot, and as the tables of docs/benchmarks.md.

    python -m benchmarks.report [--show] FILE.json

puts the tables of a run into docs/benchmarks.md, between its markers, and the plot beside it. With --show it only
prints the tables that the run has.
"""

import argparse
import importlib.metadata
import json
import os
import platform
import re
import statistics
import sys
import textwrap
from pathlib import Path
from typing import Any

from .workloads import OPTIONS, WORKLOADS

DOCS = Path(__file__).parents[1] / "docs"
HEADING = f"{'workload':11s} {'option':7s} {'gradients':9s} {'contender':22s} {'ours':>10s} {'theirs':>10s}  theirs/ours (quartiles)"
PACKAGES = ("numpy", "numba", "torch", "jax", "optax", "keras", "deepspeed", "bitsandbytes")
Found = dict[str, Any]


def duration(seconds: float) -> str:
    """A time with three digits and a unit."""
    unit, size = next(((u, s) for u, s in (("s", 1.0), ("ms", 1e-3)) if seconds >= s), ("us", 1e-6))
    return f"{seconds / size:.3g} {unit}"


def _ratio(row: Found) -> str:
    return f"{row['ratio']:.2f} ({row['low']:.2f} to {row['high']:.2f})"


def line(row: Found) -> str:
    """One row of the table that a run prints."""
    return (
        f"{row['workload']:11s} {row['option']:7s} {row['gradients']:9s} {row['contender']:22s} "
        f"{duration(row['ours']):>10s} {duration(row['theirs']):>10s}  {_ratio(row)}"
    )


def machine() -> Found:
    """The machine and the versions that the figures belong to."""
    model = platform.processor() or platform.machine()
    if sys.platform == "linux":
        names = re.findall(r"^model name\s*:\s*(.*)$", Path("/proc/cpuinfo").read_text(), re.M)
        model = names[0] if names else model
    found = {
        "processor": model,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
    }
    found["versions"] = {"Python": platform.python_version()}
    for package in PACKAGES:
        try:
            found["versions"][package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def costs(found: Found) -> str:
    """Imports, first steps, compilation and memory, one line each."""
    lines = [
        f"import numpy {duration(found['import']['numpy'])}, then adamw_numba {duration(found['import']['adamw_numba'])}"
    ]
    for name, text in (("cold", "first build and step, nothing compiled"), ("warm", "the same with cached kernels")):
        build, apply = found["first step"][name]["build"], found["first step"][name]["apply"]
        lines.append(f"{text}: {duration(build + apply)}, of which the default variant {duration(apply)}")
    lines += [f"further variant: {name} {duration(seconds)}" for name, seconds in found["compile"].items()]
    for key in ("memory plain", "memory full"):
        for name, memory in found.get(key, {}).items():
            lines.append(
                f"{key}: {name}: resident memory grows by {memory['resident'] / 1e6:.1f} MB during a step; "
                f"{memory['allocated'] / 1e6:.3f} MB allocated through Python and NumPy"
            )
    return "\n".join(lines)


def model(found: Found) -> str:
    """The constants of the cost model, and what they predict."""
    lines = [f"{name}: {duration(seconds) if seconds else '0'}" for name, seconds in found["seconds"].items()]
    lines += [f"{name}: {rate / 1e9:.1f} GB/s" for name, rate in found["bytes per second"].items() if rate]
    for name, times in found["workloads"].items():
        error = times["predicted"] / times["measured"] - 1
        lines.append(
            f"{name}: measured {duration(times['measured'])}, predicted {duration(times['predicted'])} ({error:+.0%})"
        )
    return "\n".join(lines)


def need_matplotlib() -> Any:
    """Import matplotlib, or say how to install it."""
    try:
        import matplotlib
    except ImportError:
        raise SystemExit("--plot needs matplotlib: pip install 'adamw-numba[bench]'") from None
    matplotlib.use("svg")
    return matplotlib


def plot(sweep: list[Found], file: Path) -> None:
    """Plot the time of a step against the size of one array."""
    matplotlib = need_matplotlib()
    matplotlib.rcParams["svg.hashsalt"] = "adamw_numba"
    from matplotlib import pyplot

    series: dict[str, dict[int, list[float]]] = {}
    for row in sweep:
        count, size = row["sweep"]
        if count == 1:
            for name, seconds in (("adamw_numba", row["ours"]), (row["contender"], row["theirs"])):
                series.setdefault(name, {}).setdefault(size, []).append(seconds)
    curves = {name: {size: statistics.median(times) for size, times in each.items()} for name, each in series.items()}
    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    for name, curve in curves.items():
        axes.loglog(list(curve), list(curve.values()), "k:" if name == "limit" else "o-", label=name, markersize=3)
    axes.set(xlabel="elements of one float32 array", ylabel="seconds per step")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(file, metadata={"Date": None})
    pyplot.close(figure)


def _table(heading: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(row) + " |" for row in [heading, ["---"] * len(heading), *rows]]
    return "\n".join(lines)


def ratio_table(found: Found, option: str) -> str:
    """One option: our times (the median over all pairs) in the first row, then each contender's ratio per workload."""
    rows = [row for row in found["rows"] if row["option"] == option and row["gradients"] == "same"]
    workloads = [name for name in WORKLOADS if any(row["workload"] == name for row in rows)]
    contenders = list(dict.fromkeys(row["contender"] for row in rows))
    cell = {(row["contender"], row["workload"]): row for row in rows}
    mine = [duration(statistics.median(row["ours"] for row in rows if row["workload"] == name)) for name in workloads]
    body = [["**ours**", *mine]]
    for contender in contenders:
        entries = [cell.get((contender, name)) for name in workloads]
        body.append([contender, *(f"{row['ratio']:.2f}" if row else "" for row in entries)])
    return _table(["", *workloads], body)


def fresh_table(found: Found) -> str:
    """Small workloads: new gradient arrays at each step, compared with the same arrays."""
    rows = {(r["workload"], r["contender"], r["gradients"]): r for r in found["rows"] if r["option"] == "plain"}
    body = []
    for workload, contender, kind in rows:
        if kind == "fresh":
            same, fresh = rows[workload, contender, "same"], rows[workload, contender, "fresh"]
            body.append(
                [
                    workload,
                    contender,
                    duration(fresh["ours"]),
                    duration(fresh["theirs"]),
                    _ratio(fresh),
                    f"{same['ratio']:.2f}",
                ]
            )
    return _table(["workload", "contender", "ours", "theirs", "ratio", "ratio, same arrays"], body)


def read(file: Path) -> Found:
    """Read what ``compare --json`` has written.

    Raises
    ------
    SystemExit
        If the file is missing or is not such a file.
    """
    try:
        found = json.loads(file.read_text())
    except OSError as error:
        raise SystemExit(f"{file} cannot be read: {error.strerror}") from None
    except ValueError:
        found = None
    kinds = {"machine": dict, "command": str, "rows": list, "sweep": list, "absent": dict}
    if not isinstance(found, dict) or not all(isinstance(found.get(key), kind) for key, kind in kinds.items()):
        raise SystemExit(f"{file} is not what `python -m benchmarks.compare --json` writes")
    return found


def lacks(found: Found) -> list[str]:
    """What the page needs and a partial or quick run does not have."""
    options = {row["option"] for row in found["rows"]}
    missing = [option for option in OPTIONS if option not in options]
    return missing + [key for key in ("sweep", "costs", "model") if not found.get(key)]


def sections(found: Found) -> dict[str, str]:
    """The measured parts of docs/benchmarks.md."""
    machine, versions = found["machine"], found["machine"]["versions"]
    named = ", ".join(f"{name} {version}" for name, version in versions.items())
    absent = "; ".join(found["absent"]) or "nothing"
    about = (
        f"{machine['processor']}, {machine['cores']} cores; {named}.",
        f"`{found['command']}`",
        f"Not installed: {absent}.",
    )
    result = {
        "machine": "\n\n".join(textwrap.fill(line, 125, break_long_words=False) for line in about),
        "fresh": fresh_table(found),
        "costs": "```\n" + costs(found["costs"]) + "\n```",
        "model": "```\n" + model(found["model"]) + "\n```",
    }
    return result | {option: ratio_table(found, option) for option in OPTIONS}


def render(text: str, parts: dict[str, str]) -> str:
    """Put each part between ``<!-- name -->`` and ``<!-- end -->``.

    Raises
    ------
    ValueError
        If the text has no place for one.
    """
    for name, part in parts.items():
        pattern = re.compile(rf"(<!-- {re.escape(name)} -->\n).*?(<!-- end -->)", re.S)
        if not pattern.search(text):
            raise ValueError(
                f"the text has no place for {name!r}; expected the markers <!-- {name} --> and <!-- end -->"
            )
        text = pattern.sub(lambda match, part=part: f"{match[1]}{part}\n{match[2]}", text)
    return text


def main(arguments: list[str]) -> int:
    """Update docs/benchmarks.md and its plot with a run."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=main.__doc__)
    parser.add_argument("--show", action="store_true", help="only print the tables; a partial run is enough")
    parser.add_argument("file", type=Path, help="a file written by `python -m benchmarks.compare --json`")
    options = parser.parse_args(arguments)
    file, page, picture = options.file, DOCS / "benchmarks.md", DOCS / "benchmarks.svg"
    found = read(file)
    if options.show:
        for option in dict.fromkeys(row["option"] for row in found["rows"]):
            print(f"{option}: ours, then how many times as long the others take\n\n{ratio_table(found, option)}\n")
        return 0
    if missing := lacks(found):
        raise SystemExit(f"{file} lacks {', '.join(missing)}; expected a full run, without --quick")
    page.write_text(render(page.read_text(), sections(found)))
    plot(found["sweep"], picture)
    print(f"wrote {page} and {picture}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

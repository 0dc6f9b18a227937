"""`python -m adamw_numba`: what it prints, what it refuses, and its exit status."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers.states import STORES, build, go_on, image, optimizer_of, variables_of

import adamw_numba
from adamw_numba import AdamW, LossScaleOptimizer
from adamw_numba.__main__ import main

ROOT = str(Path(adamw_numba.__file__).parents[1])


@pytest.mark.parametrize("source", STORES)
def test_command_line(source, tmp_path, capsys):
    variables, optimizer = variables_of("bfloat16"), optimizer_of("scaled")
    optimizer.build(variables)
    go_on(optimizer, variables, 0, 5)
    optimizer.save(tmp_path / source, extra={"e": 1}, variables=True)
    assert main(["inspect", str(tmp_path / source)]) == 0
    table = capsys.readouterr().out
    assert "LossScaleOptimizer, step 4" in table
    assert "bfloat16" in table
    assert main(["inspect", "--json", str(tmp_path / source)]) == 0
    assert json.loads(capsys.readouterr().out)["extra"] == {"e": 1}
    for target in STORES:
        converted = tmp_path / f"converted-{target}"
        assert main(["convert", str(tmp_path / source), str(converted)]) == 0
        assert main(["verify", str(converted)]) == 0
        copies = {k: np.zeros_like(v) for k, v in variables.items()}
        assert image(LossScaleOptimizer.load(converted, copies), copies) == image(optimizer, variables)
    if source == "s.npz":
        (tmp_path / source).write_bytes(b"PK nonsense")
        capsys.readouterr()
        assert main(["verify", str(tmp_path / source)]) == 1
        assert "s.npz" in capsys.readouterr().err


def command(*arguments, **options):
    given = [sys.executable, "-m", "adamw_numba", *map(str, arguments)]
    return subprocess.run(given, capture_output=True, text=True, **options)


def test_names_are_printed_as_people_write_them(tmp_path, capsys):
    """And nothing that would steer a terminal: a file may come from anybody."""
    build({"dense": {"kernel": np.ones(3)}, "b\x1b[2J\n": np.ones(1), "重": np.ones(2)}).save(tmp_path / "s.npz")
    assert main(["inspect", str(tmp_path / "s.npz")]) == 0
    printed = capsys.readouterr().out
    for key in ("momentum/dense/kernel ", "velocity/b\\x1b[2J\\n ", "velocity/重 ", "iteration "):
        assert f"\n{key}" in printed
    assert "%2F" not in printed
    assert "\x1b" not in printed


@pytest.mark.parametrize("store", STORES)
def test_convert_replaces_nothing_unless_told(store, tmp_path, capsys):
    source, target = tmp_path / "source.npz", tmp_path / store
    build({"w": np.ones(3)}).save(source, extra="new")
    build({"w": np.ones(3)}).save(target, extra="old")
    assert main(["convert", str(source), str(target)]) == 1
    assert capsys.readouterr().err == f"{target} exists; expected a new target, or `--force` to replace it\n"
    assert AdamW.load(target).extra == "old"
    assert main(["convert", "--force", str(source), str(target)]) == 0
    assert capsys.readouterr().out == f"{target}: wrote 4 arrays, 64 bytes, of step 0\n"
    assert AdamW.load(target).extra == "new"
    for other in (source, "memory://convert/s.zarr"):  # itself; a URL
        assert main(["convert", "--force", str(source), str(other)]) == 0
        assert main(["convert", str(source), str(other)]) == 1
        assert "exists" in capsys.readouterr().err


@pytest.mark.parametrize(("target", "words"), [("s.pt", ["s.pt", ".npz"]), ("none/s.npz", ["none"])])
def test_convert_to_where_nothing_can_be(target, words, tmp_path, capsys):
    build({"w": np.ones(3)}).save(tmp_path / "source.npz")
    assert main(["convert", str(tmp_path / "source.npz"), str(tmp_path / target)]) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert all(word in printed.err for word in words)
    assert [path.name for path in tmp_path.iterdir()] == ["source.npz"]


@pytest.mark.parametrize("options", [[], ["--json"]], ids=["table", "json"])
def test_a_reader_that_closes_early(options, tmp_path):
    """As `head` does: no message, and the status of a process that SIGPIPE has ended."""
    build({f"{index}": np.ones(1) for index in range(20)}).save(tmp_path / "s.npz")
    given = [sys.executable, "-m", "adamw_numba", "inspect", str(tmp_path / "s.npz"), *options]
    process = subprocess.Popen(given, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    with process.stderr:
        assert process.stderr.read() == b""
    assert process.wait() == 141


def test_version():
    done = command("--version")
    assert (done.returncode, done.stdout) == (0, f"adamw_numba {adamw_numba.__version__}\n")


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (["verify", "none.npz"], 1, "none.npz"),
        ([], 2, "inspect,verify,convert"),
        (["convert", "a.npz"], 2, "target"),
    ],
    ids=["no file", "no command", "no target"],
)
def test_errors_go_to_the_error_stream(arguments, status, words, tmp_path):
    done = command(*arguments, cwd=tmp_path, env=os.environ | {"PYTHONPATH": ROOT})
    assert (done.returncode, done.stdout) == (status, "")
    assert words in done.stderr
    assert "Traceback" not in done.stderr

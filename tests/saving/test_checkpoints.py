"""`Checkpoints`: which files are kept, which one counts, and what becomes of errors in the background."""

import subprocess
import sys
import threading

import numpy as np
import pytest
from helpers.states import build, image

import adamw_numba
from adamw_numba import Checkpoints, CorruptFileError
from adamw_numba.saving.stores import npz


@pytest.mark.parametrize("background", [False, True])
@pytest.mark.parametrize("suffix", [".npz", ".zarr"])
def test_checkpoints(background, suffix, tmp_path):
    variables = {"w": np.ones(3)}
    optimizer = build(variables)
    seen = {}
    with Checkpoints(tmp_path / "runs", keep=2, every=2, background=background, suffix=suffix) as checkpoints:
        assert checkpoints.latest() is None
        assert checkpoints.restore_latest(optimizer) is None
        for step in range(1, 8):
            optimizer.apply({"w": np.full(3, float(step))})
            saved = checkpoints.save(optimizer, step, extra={"step": step}, variables=True, force=step == 7)
            assert (saved is None) == (step in (1, 3, 5))
            seen[step] = image(optimizer, variables)
        assert checkpoints.latest().name == f"step-000000000007{suffix}"
        names = [path.name for path in sorted((tmp_path / "runs").iterdir())]
        assert names == [f"step-000000000006{suffix}", f"step-000000000007{suffix}"]
        assert checkpoints.restore_latest(optimizer).step == 7
        if suffix == ".npz":
            newest = tmp_path / "runs" / names[-1]
            newest.write_bytes(newest.read_bytes()[:-50])
            with pytest.warns(UserWarning, match=r"step-000000000007.*cannot be read"):
                step, extra, path = checkpoints.restore_latest(optimizer)
            assert (step, extra, path.name) == (6, {"step": 6}, names[0])
            assert image(optimizer, variables) == seen[6]


def test_background_errors_surface_and_steps_go_on(tmp_path, monkeypatch):
    variables = {"w": np.ones(3)}
    optimizer = build(variables)
    checkpoints = Checkpoints(tmp_path, background=True)
    gate, write = threading.Event(), adamw_numba.saving.archive.write
    monkeypatch.setattr(adamw_numba.saving.archive, "write", lambda *given: (gate.wait(10), write(*given)))
    before = image(optimizer, variables)
    checkpoints.save(optimizer, 1, variables=True)
    optimizer.apply({"w": np.ones(3)})
    gate.set()
    assert checkpoints.restore_latest(optimizer).step == 1
    assert image(optimizer, variables) == before

    def fail(*given):
        raise OSError(28, "No space left on device")

    for surfacing in (lambda: checkpoints.save(optimizer, 3), checkpoints.close):
        monkeypatch.setattr(adamw_numba.saving.archive, "write", fail)
        checkpoints.save(optimizer, 2)
        with pytest.raises(OSError, match="No space"):
            surfacing()
    checkpoints.close()


def test_errors_of_the_background_are_not_lost(tmp_path, monkeypatch):
    """Not by an interrupt while they are waited for, not where nobody calls `close`; a step not due does not wait."""
    optimizer, gate = build({"w": np.ones(3)}), threading.Event()

    def fail(*given):
        gate.wait(10)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(adamw_numba.saving.archive, "write", fail)
    checkpoints = Checkpoints(tmp_path, background=True, every=2)
    checkpoints.save(optimizer, 2)
    assert checkpoints.save(optimizer, 3) is None
    with monkeypatch.context() as patches:
        patches.setattr(
            adamw_numba.saving.checkpoints, "wait", lambda futures: (_ for _ in ()).throw(KeyboardInterrupt)
        )
        with pytest.raises(KeyboardInterrupt):
            checkpoints.close()
    gate.set()
    with pytest.raises(OSError, match="No space"):
        checkpoints.close()
    code = "import numpy, adamw_numba; from adamw_numba.saving import archive\n"
    code += "def fail(*given): raise OSError(28, 'No space left')\narchive.write = fail\n"
    code += "optimizer = adamw_numba.AdamW(); optimizer.build([numpy.ones(3)])\n"
    code += f"adamw_numba.Checkpoints({str(tmp_path)!r}, background=True).save(optimizer, 1)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "could not be written" in done.stderr


def test_going_back_gives_up_what_was_later(tmp_path):
    optimizer = build({"w": np.ones(3)})
    checkpoints = Checkpoints(tmp_path, keep=2)
    for step in (1, 2, 8, 9, 3, 4):
        checkpoints.save(optimizer, step, extra=step)
        assert checkpoints.restore_latest(optimizer).step == step
    assert len(list(tmp_path.iterdir())) == 2


def test_a_folder_of_checkpoints_stays_where_it_was(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    checkpoints = Checkpoints("relative")
    monkeypatch.chdir("/")
    checkpoints.save(build({"w": np.ones(3)}), 1)
    assert checkpoints.latest() == tmp_path / "relative" / "step-000000000001.npz"


def test_what_cannot_be_read_is_not_nothing(tmp_path, monkeypatch):
    optimizer, checkpoints = build({"w": np.ones(3)}), Checkpoints(tmp_path)
    for step in (1, 2):
        checkpoints.save(optimizer, step)
    with monkeypatch.context() as patches:
        patches.setattr(npz, "open", lambda *given: (_ for _ in ()).throw(OSError(5, "I/O error")), raising=False)
        for act in (checkpoints.latest, lambda: checkpoints.restore_latest(optimizer)):
            with pytest.raises(OSError, match="I/O error"):
                act()
    for path in tmp_path.iterdir():
        path.write_bytes(b"PK")
    for act in (checkpoints.latest, lambda: checkpoints.restore_latest(optimizer)):
        with pytest.warns(UserWarning, match="left out"), pytest.raises(CorruptFileError, match="holds 2 checkpoints"):
            act()

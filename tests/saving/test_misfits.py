"""What does not fit: an error that says what, in a few hundred characters, and nothing has changed."""

from pathlib import Path

import numpy as np
import pytest
from helpers.states import build

from adamw_numba import AdamW, Checkpoints, CorruptFileError, LossScaleOptimizer
from adamw_numba.saving import manifest, snapshot

W = np.zeros(3, np.float32)
CIRCLE = []
CIRCLE.append(CIRCLE)
# what is done with a file of {"w": float32 (3,)} saved by AdamW(0.1) -> error, words
MISFITS = {
    "shape": (lambda p: AdamW.load(p, {"w": np.zeros(4, "f4")}), ValueError, ["'w'", "(3,)", "(4,)"]),
    "dtype": (lambda p: AdamW.load(p, {"w": np.zeros(3)}), ValueError, ["'w'", "float32", "float64"]),
    "name": (lambda p: AdamW.load(p, [W]), ValueError, ["'0'", "'w'"]),
    "class": (lambda p: LossScaleOptimizer.load(p), ValueError, ["AdamW", "LossScaleOptimizer"]),
    "amsgrad": (lambda p: build({"w": W}, amsgrad=True).restore(p), ValueError, ["velocity_hat", "'w'"]),
    "schedule": (
        lambda p: build({"w": W}, learning_rate=lambda: 0.1).restore(p),
        ValueError,
        ["learning_rate", "assign a schedule after"],
    ),
    "not built": (lambda p: AdamW().restore(p), ValueError, ["restore", "build"]),
    "no file": (lambda p: AdamW.load(p.with_name("none.npz")), FileNotFoundError, ["none.npz"]),
    "suffix": (lambda p: AdamW.load(p.with_name("s.pkl")), ValueError, ["s.pkl", ".npz", ".safetensors"]),
    "Keras's suffix": (lambda p: AdamW.load(p.with_name("s.weights.h5")), ValueError, ["from_keras"]),
    "no target": (lambda p: AdamW.load(3), TypeError, ["3", "int", "mapping"]),
    "save nowhere": (lambda p: build([W]).save(3.0), TypeError, ["3.0", "float"]),
    "save unbuilt": (lambda p: AdamW().save(p), ValueError, ["save", "build"]),
    "no folder": (lambda p: build([W]).save(p.parent / "none" / "s.npz"), FileNotFoundError, ["none"]),
    "extra array": (lambda p: build([W]).save(p, {"x": [W]}), TypeError, ["extra['x'][0]", "ndarray", "tolist"]),
    "extra keys": (lambda p: build([W]).save(p, {"x": {1: 2}}), TypeError, ["extra['x']", "key 1", "strings"]),
    "keep": (lambda p: Checkpoints(p.parent, keep=0), ValueError, ["keep", "0"]),
    "every": (lambda p: Checkpoints(p.parent, every=0), ValueError, ["every", "0"]),
    "folder at a URL": (lambda p: Checkpoints("s3://bucket/run", suffix=".zarr"), ValueError, ["directory", "s3://"]),
    "URL as a path": (lambda p: build([W]).save(Path("memory://x.zarr")), ValueError, ["memory:/x.zarr", "string"]),
    "dtype that no file holds": (
        lambda p: AdamW().add_variable((3,), dtype=">f4"),
        TypeError,
        ["dtype", ">f4", "native"],
    ),
    "lone surrogate": (lambda p: build({"\ud800": W}), ValueError, ["\\ud800", "surrogate"]),
    "extra of itself": (lambda p: build([W]).save(p, CIRCLE), ValueError, ["extra", "holds itself"]),
    "extra too long": (lambda p: build([W]).save(p, [10**5000]), ValueError, ["extra[0]", "bits"]),
    "no .safetensors": (lambda p: AdamW.load(p.with_name("n.safetensors")), FileNotFoundError, ["n.safetensors"]),
    "kind of file": (lambda p: Checkpoints(p.parent, suffix=".pt"), ValueError, [".pt", ".npz"]),
}


@pytest.mark.parametrize(("act", "error", "words"), MISFITS.values(), ids=MISFITS)
def test_misfits_change_nothing(act, error, words, tmp_path):
    path = tmp_path / "s.npz"
    build({"w": W}, learning_rate=0.1).save(path)
    before = path.read_bytes()
    with pytest.raises(error) as caught:
        act(path)
    for word in words:
        assert word in str(caught.value)
    assert path.read_bytes() == before
    assert sorted(tmp_path.iterdir()) == [path]


def test_the_largest_document_loads(monkeypatch):
    optimizer = build({"w": W})
    length = len(manifest.encode(snapshot.take(optimizer, "").document))
    monkeypatch.setattr(manifest, "LONGEST", length + 1000)
    saved = 0
    for size in range(500, 1000):
        store = {}
        try:
            optimizer.save(store, "x" * size)
        except ValueError as error:
            assert "extra" in str(error)
        else:
            saved += 1
            assert len(AdamW.load(store).extra) == size
    assert 0 < saved < 500


def test_errors_are_one_class():
    assert issubclass(CorruptFileError, ValueError)

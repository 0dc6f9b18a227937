"""What does not fit: an error that says what, in a few hundred characters, and nothing has changed."""

from pathlib import Path

import numpy as np
import pytest
from helpers.states import build

from adamw_numba import AdamW, Checkpoints, CorruptFileError, LossScaleOptimizer
from adamw_numba.saving import archive, manifest, snapshot

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


MANY, LONG = 1500, "n" * 100_000


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """An optimizer of many variables, and its file."""
    optimizer = build({f"variable {index}": np.zeros(1) for index in range(MANY)})
    path = tmp_path_factory.mktemp("many") / "s.npz"
    optimizer.save(path, variables=True)
    return optimizer, path


def changed(path, change):
    """A store like a file, with another document or other arrays."""
    saved, store = archive.read(path), {}
    dtypes = {key: entry["dtype"] for key, entry in saved.document["arrays"].items()}
    change(saved)
    archive.write(store, {k: v for k, v in saved.document.items() if k != "crc32"}, saved.arrays, dtypes, False)
    return store


def long_argument(saved):
    saved.document["config"][LONG] = 1


def long_value(saved):
    saved.document["config"]["beta_1"] = LONG


def no_velocities(saved):
    for key in [key for key in saved.arrays if key.startswith("velocity")]:
        del saved.arrays[key]


def zeros(count, size=1, prefix="variable "):
    return {f"{prefix}{index}": np.zeros(size) for index in range(count)}


# what is done with an optimizer of many variables and its file -> words of a message
BOUNDED = {
    "other names": (lambda o, p: AdamW.load(p, zeros(MANY, prefix="x")), ["'x0'", "'variable 0'", " more]"]),
    "other shapes": (lambda o, p: AdamW.load(p, zeros(MANY, 2)), ["'variable 0'", "(2,)", "1497 more"]),
    "fewer": (lambda o, p: build(zeros(9)).restore(p), ["holds ['variable 9'", "not among the variables", " more]"]),
    "slots": (lambda o, p: o.restore(changed(p, no_velocities)), ["lacks the velocity of 'variable 0'"]),
    "slots that no option asks for": (
        lambda o, p: build({LONG: np.zeros(1)}).restore(saved_of({LONG: np.zeros(1)}, amsgrad=True)),
        ["velocity_hat/nnn", "`amsgrad` is not set"],
    ),
    "a slot that the file lacks": (
        lambda o, p: build({"w": np.zeros(1)}, use_ema=True).restore(saved_of({"w": np.zeros(1)})),
        ["lacks the average of 'w'", "`use_ema` asks for"],
    ),
    "a long name": (lambda o, p: AdamW.load(saved_of({LONG: np.zeros(1)}), {LONG: np.zeros(2)}), ["'nnn", "(2,)"]),
    "argument": (lambda o, p: AdamW.load(changed(p, long_argument)), ["config that cannot be used"]),
    "value": (lambda o, p: AdamW.load(changed(p, long_value)), ["config that cannot be used", "beta_1"]),
    "added": (lambda o, p: o.restore(added(MANY)), ["'added/mine0'", " more]"]),
    "weights": (lambda o, p: o.set_weights([]), ["0 arrays", "expected 3002", "'momentum/variable 0'", " more]"]),
    "shape of a weight": (
        lambda o, p: build({LONG: np.zeros(1)}).set_weights([0, 0.1, np.zeros(2), np.zeros(1)]),
        ["momentum/nnn", "(2,)"],
    ),
    "positions": (lambda o, p: o.load_own_variables(zeros(MANY)), ["'variable 0'", " more]", "'3001'"]),
    "target": (lambda o, p: AdamW.load(LONG), ["nnn", ".npz"]),
    "URL": (lambda o, p: o.save(Path(f"memory://{LONG}")), ["memory:/nnn", "URL"]),
    "object": (lambda o, p: o.save([LONG]), ["nnn", "mapping"]),
    "key of extra": (lambda o, p: o.save({}, {LONG: {1: 2}}), ["extra['nnn", "key 1"]),
    "value of extra": (lambda o, p: o.save({}, {"x": {LONG}}), ["extra['x']", "nnn"]),
    "a long path in extra": (lambda o, p: o.save({}, nested(100, {1})), ["extra[0][0]", "{1}"]),
    "surrogate": (lambda o, p: build({LONG + "\ud800": np.zeros(1)}).save({}), ["surrogate"]),
}


def saved_of(variables, **options):
    store = {}
    build(variables, **options).save(store)
    return store


def added(count):
    optimizer, store = build(zeros(MANY)), {}
    for index in range(count):
        optimizer.engine.state.added[1][f"mine{index}"] = np.zeros(())  # `add_variable` compares with all others
    optimizer.save(store)
    return store


def nested(depth, value):
    return [nested(depth - 1, value)] if depth else value


@pytest.mark.parametrize(("act", "words"), BOUNDED.values(), ids=BOUNDED)
def test_messages_are_short(act, words, many):
    optimizer, path = many
    before = {name: array.tobytes() for name, array in optimizer.state.items()}
    with pytest.raises((TypeError, ValueError)) as caught:
        act(optimizer, path)
    assert len(str(caught.value)) < 1500
    for word in words:
        assert word in str(caught.value)
    assert {name: array.tobytes() for name, array in optimizer.state.items()} == before


def test_warnings_are_short(many):
    other = AdamW(beta_1=0.8)
    other.exclude_from_weight_decay(var_names=["variable"])
    other.build(zeros(MANY))
    with pytest.warns(UserWarning, match=r"beta_1 is 0\.8.*'variable 0', .* more\] are excluded") as caught:
        other.restore(many[1])
    assert len(str(caught[0].message)) < 1500


@pytest.mark.parametrize("suffix", [".npz", ".safetensors", ".h5"])
def test_a_folder_that_is_not_there(suffix, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"the folder to save in does not exist: '.*/none'"):
        build({"w": np.zeros(1)}).save(tmp_path / "none" / f"s{suffix}")


@pytest.mark.parametrize("suffix", [".npz", ".safetensors", ".h5", ".zarr", ".zarr.zip"])
def test_a_file_that_is_not_there(suffix, tmp_path):
    with pytest.raises(FileNotFoundError, match="none"):
        AdamW.load(tmp_path / f"none{suffix}")

"""What ranks save together: loaded by any number of them, cut in any way, as if they had never stopped."""

import contextlib
import copy
import json
import re
import shutil

import numpy as np
import pytest
from helpers.thread_ranks import together

from adamw_numba import AdamW, Checkpoints, LossScaleOptimizer, saved_variables
from adamw_numba.__main__ import main
from adamw_numba.distributed import RankError, Sharded
from adamw_numba.saving import folders
from adamw_numba.saving.stores.atomic import CorruptFileError

SIZES = [1, 2, 3, 4]
SHAPES = {"a": (70, 3), "b": (5,), "c": (), "d": (0, 3), "e": (1000,)}
OPTIONS = {"global_clipnorm": 0.5, "amsgrad": True, "use_ema": True, "gradient_accumulation_steps": 2}


def values(seed, dtype="float32"):
    generator = np.random.default_rng(seed)
    found = {name: generator.standard_normal(shape) for name, shape in SHAPES.items()}
    return {name: np.asarray(value, dtype) for name, value in found.items()}


def rows(array, ranks):
    """A rank's part along the first axis, of uneven lengths; of what has no axis the whole."""
    if not array.shape:
        return array.copy()
    bounds = [0, *(len(array) * (k + 1) ** 2 // ranks.size**2 for k in range(ranks.size))]
    return array[bounds[ranks.rank] : bounds[ranks.rank + 1]].copy()


class Strips:
    """Each rank has some rows of every variable; the one without axes is everybody's."""

    def __init__(self, make, ranks):
        self.ranks, self.optimizer = ranks, make()

    def cut(self, whole):
        return {name: rows(array, self.ranks) for name, array in whole.items()}

    def build(self, whole):
        self.variables = self.cut(whole)
        self.optimizer.build(self.variables, comm=self.ranks, replicated=["^c$"])

    def apply(self, whole):
        self.optimizer.apply(self.cut(whole))

    def __getattr__(self, name):
        return getattr(self.optimizer, name)

    def check(self, expected):
        for name, array in self.cut(expected).items():
            np.testing.assert_array_equal(self.variables[name], array, err_msg=name)


class Shared(Strips):
    """Each rank has all variables, and a share of the state."""

    def __init__(self, make, ranks):
        self.ranks, self.optimizer = ranks, Sharded(make(), ranks, gradients="reduced")

    def build(self, whole):
        self.variables = {name: array.copy() for name, array in whole.items()}
        self.optimizer.build(self.variables)

    def cut(self, whole):
        return whole


class Alone(Shared):
    """One process without ranks."""

    def __init__(self, make, ranks):
        self.optimizer = make()


def new(dtype):
    return LossScaleOptimizer(AdamW(0.1, **OPTIONS), initial_scale=4.0) if dtype == "float16" else AdamW(0.1, **OPTIONS)


def steps(run, first, count, dtype):
    for step in range(first, first + count):
        run.apply(values(100 + step, dtype))


KINDS = {"strips": Strips, "shared": Shared, "alone": Alone}
WAYS = [
    (saved, savers, loaded, loaders)
    for saved in KINDS
    for savers in ([1] if saved == "alone" else SIZES)
    for loaded in KINDS
    for loaders in ([1] if loaded == "alone" else SIZES)
]


@pytest.mark.parametrize(
    ("saved", "savers", "loaded", "loaders", "dtype"),
    [(*way, "float32") for way in WAYS] + [(*way, "float16") for way in WAYS if {way[1], way[3]} in ({2, 3}, {1, 3})],
)
def test_saved_by_some_and_loaded_by_others(saved, savers, loaded, loaders, dtype, tmp_path):
    whole = Alone(lambda: new(dtype), None)
    whole.build(values(0, dtype))
    steps(whole, 0, 6, dtype)
    folder = tmp_path / ("state.npz" if saved == "alone" else "state")

    def save(ranks):
        run = KINDS[saved](lambda: new(dtype), ranks)
        run.build(values(0, dtype))
        steps(run, 0, 3, dtype)
        run.save(folder, extra={"epoch": 3}, variables=True)

    def load(ranks):
        kind = type(new(dtype))
        run = KINDS[loaded](lambda: kind.load(folder), ranks)
        run.build(values(7, dtype))
        inner = getattr(run.optimizer, "optimizer", run.optimizer)
        assert inner.extra == {"epoch": 3}
        steps(run, 3, 3, dtype)
        run.check(whole.variables)
        assert inner.iterations == whole.iterations

    def restore(ranks):
        run = KINDS[loaded](lambda: new(dtype), ranks)
        run.build(values(7, dtype))
        steps(run, 50, 1, dtype)
        assert run.restore(folder) == {"epoch": 3}
        steps(run, 3, 3, dtype)
        run.check(whole.variables)

    together(savers, save)
    together(loaders, load)
    together(loaders, restore)
    assert [*saved_variables(folder)] == [*SHAPES]
    assert saved_variables(folder)["a"].shape == (70, 3)


def test_boxes_of_a_grid(tmp_path):
    """Of a variable that is cut along both axes, the ranks say where their boxes are."""
    whole, boxes = np.arange(30, dtype=float).reshape(5, 6), [(0, 2, 0, 4), (0, 2, 4, 6), (2, 5, 0, 3), (2, 5, 3, 6)]

    def work(ranks):
        top, bottom, left, right = boxes[ranks.rank]
        part = whole[top:bottom, left:right].copy()
        optimizer = AdamW(0.1, clipnorm=1.0)
        optimizer.build({"w": part}, comm=ranks, pieces={"w": (slice(top, bottom), slice(left, right))})
        optimizer.apply({"w": part.copy()})
        optimizer.save(tmp_path / "state", variables=True)
        return optimizer.state["momentum/w"], part

    found = together(4, work)
    optimizer = AdamW(0.1, clipnorm=1.0)
    variables = {"w": whole.copy()}
    optimizer.build(variables)
    optimizer.apply({"w": whole.copy()})
    loaded = AdamW.load(tmp_path / "state", {"w": np.zeros((5, 6))})
    for (top, bottom, left, right), (momentum, part) in zip(boxes, found, strict=True):
        np.testing.assert_array_equal(loaded.state["momentum/w"][top:bottom, left:right], momentum)
        np.testing.assert_array_equal(saved_variables(tmp_path / "state")["w"][top:bottom, left:right], part)
    np.testing.assert_allclose(loaded.state["momentum/w"], optimizer.state["momentum/w"], rtol=1e-12)

    def again(ranks):
        rows = [whole[:3], whole[3:]][ranks.rank].copy()
        again = AdamW.load(tmp_path / "state", {"w": rows}, comm=ranks)
        return again.state["momentum/w"]

    np.testing.assert_array_equal(np.concatenate(together(2, again)), loaded.state["momentum/w"])


def test_checkpoints(tmp_path):
    """Folders are kept and removed together, and what one rank finds damaged is left out by all."""

    def work(ranks):
        run = Strips(lambda: AdamW(0.1), ranks)
        run.build(values(0))
        checkpoints = Checkpoints(tmp_path, keep=2, suffix="")
        for step in range(3):
            steps(run, step, 1, "float32")
            checkpoints.save(run.optimizer, step + 1, extra=step, variables=True)
        return run.variables

    together(3, work)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000000000002", "step-000000000003"]
    newest = tmp_path / "step-000000000003"
    damaged = sorted(newest.glob("rank-00002*"))[0]
    damaged.write_bytes(damaged.read_bytes()[:-50])

    def restore(ranks):
        run = Shared(lambda: AdamW(0.1), ranks)
        run.build(values(5))
        found = Checkpoints(tmp_path, suffix="").restore_latest(run.optimizer)
        return found.step, found.extra, run.variables["a"]

    with pytest.warns(UserWarning, match="a checkpoint is left out"):
        found = together(2, restore)
    whole = Alone(lambda: AdamW(0.1), None)
    whole.build(values(0))
    steps(whole, 0, 2, "float32")
    for step, extra, a in found:
        assert (step, extra) == (2, 1)
        np.testing.assert_array_equal(a, whole.variables["a"])
    with pytest.warns(UserWarning, match="a checkpoint is left out"):
        assert Checkpoints(tmp_path, suffix="").latest().name == "step-000000000002"


def saved(folder, size=3):
    def work(ranks):
        run = Strips(lambda: AdamW(0.1), ranks)
        run.build(values(0))
        steps(run, 0, 2, "float32")
        run.save(folder, variables=True)

    together(size, work)


DAMAGES = {
    "no index": (lambda folder: (folder / "index.json").unlink(), "lacks index.json"),
    "an index cut short": (lambda folder: _cut(folder / "index.json"), "damaged"),
    "a file is missing": (lambda folder: _file(folder, 1).unlink(), "lacks rank-00001-of-00003"),
    "a file cut short": (lambda folder: _cut(_file(folder, 2)), "rank-00002-of-00003"),
    "a file of another rank": (lambda folder: shutil.copy(_file(folder, 0), _file(folder, 1)), "is not as index.json"),
    "a part that overlaps": (lambda folder: _forge(folder, lambda parts: parts["a"][1].__setitem__(1, [0, 0])), "says that the parts of 'a' are"),
    "a part that is missing": (lambda folder: _forge(folder, lambda parts: parts["a"].pop()), "says that the parts of 'a' are"),
    "a part outside": (lambda folder: _forge(folder, lambda parts: parts["a"][0].__setitem__(1, [69, 0])), "says that the parts of 'a' are"),
    "parts that are none": (lambda folder: _forge(folder, lambda parts: parts.__setitem__("a", [3])), "says that the parts of 'a' are [3]"),
    "no parts": (lambda folder: _forge(folder, lambda parts: parts["a"].clear()), "says that the parts of 'a' are []"),
    "a file that is no number": (lambda folder: _forge(folder, lambda parts: parts["a"][0].__setitem__(0, 0.0)), "says that the parts of 'a' are"),
    "two parts in one file": (lambda folder: _forge(folder, lambda parts: parts["a"][1].__setitem__(0, 0)), "says that the parts of 'a' are"),
    "an array of another shape": (lambda folder: _forge(folder, lambda arrays: arrays["momentum/a"].__setitem__("shape", [70, 4]), "arrays"), "state: index.json says that 'momentum/a' has shape [70, 4]"),
    "an array of no variable": (lambda folder: _forge(folder, lambda arrays: arrays.__setitem__("momentum/x", arrays["momentum/a"]), "arrays"), "state: index.json says that 'momentum/x' has shape [70, 3]"),
    "an array of no slot": (lambda folder: _forge(folder, lambda arrays: arrays.__setitem__("pickle/a", arrays["momentum/a"]), "arrays"), "state: index.json says that 'pickle/a' has shape [70, 3]"),
    "an array of no dtype": (lambda folder: _forge(folder, lambda arrays: arrays["momentum/a"].__setitem__("dtype", "object"), "arrays"), "state: 'momentum/a' has the dtype 'object'"),
    "a name that is none": (lambda folder: _forge(folder, _rename, None), "lone surrogate"),
}  # fmt: skip


def _file(folder, rank):
    return next(folder.glob(f"rank-{rank:05d}*"))


def _cut(path):
    path.write_bytes(path.read_bytes()[:-40])


def _rename(document):
    variable = document["variables"][0]
    document["parts"]["\ud800"] = document["parts"].pop(variable["name"])
    variable["name"] = "\ud800"


def _forge(folder, change, part="parts"):
    """An index that knows its checksum, and is wrong."""
    from adamw_numba.saving import manifest

    document = json.loads((folder / "index.json").read_bytes())
    change(document[part] if part else document)
    for key in ("crc32", "format", "version", "versions"):
        del document[key]
    (folder / "index.json").write_bytes(manifest.encode(document))


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_folders(damage, tmp_path):
    """All ranks refuse, and nothing has changed."""
    spoil, text = DAMAGES[damage]
    folder = tmp_path / "state"
    saved(folder)
    spoil(folder)
    with pytest.raises(CorruptFileError, match=re.escape(text)):
        AdamW.load(folder, values(0))

    def work(ranks):
        run = Shared(lambda: AdamW(0.1), ranks)
        run.build(values(3))
        with pytest.raises((CorruptFileError, RankError), match=re.escape(text)):
            run.restore(folder)
        run.check(values(3))
        steps(run, 0, 1, "float32")

    together(2, work)


def test_a_save_between_load_and_build(tmp_path, monkeypatch):
    """The arrays belong to the head that was read, or there is an error; wherever the process has gone meanwhile."""
    monkeypatch.chdir(tmp_path)
    saved("state")
    optimizer, late = AdamW.load("state"), AdamW.load("state")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir("elsewhere")
    optimizer.build(values(0))
    assert optimizer.state["momentum/a"].any()
    saved(tmp_path / "state")
    variables = values(3)
    with pytest.raises(ValueError, match=r"state holds another save than .*: load it again"):
        late.build(variables)
    for name, array in values(3).items():
        np.testing.assert_array_equal(variables[name], array)


@pytest.mark.parametrize("seen_by", [[0], [1], [0, 1]], ids=str)
@pytest.mark.parametrize("at_once", [True, False])
def test_a_save_while_ranks_load(seen_by, at_once, tmp_path, monkeypatch):
    """Each rank reads a copy of its own, so that some of them may see what others do not."""
    saved(tmp_path / "state0")
    shutil.copytree(tmp_path / "state0", tmp_path / "state1")
    saved(tmp_path / "later")
    build = AdamW.build

    def late_build(self, *arguments, comm, **options):
        if comm.rank in seen_by:
            shutil.rmtree(tmp_path / f"state{comm.rank}")
            shutil.copytree(tmp_path / "later", tmp_path / f"state{comm.rank}")
        build(self, *arguments, comm=comm, **options)

    monkeypatch.setattr(AdamW, "build", late_build)

    def work(ranks):
        folder, variables = tmp_path / f"state{ranks.rank}", {n: rows(v, ranks) for n, v in values(3).items()}
        with pytest.raises((ValueError, RankError), match="holds another save than") as caught:
            if at_once:
                AdamW.load(folder, variables, comm=ranks, replicated=["^c$"])
            else:
                AdamW.load(folder).build(variables, comm=ranks, replicated=["^c$"])
        assert isinstance(caught.value, RankError) == (ranks.rank not in seen_by)
        np.testing.assert_array_equal(variables["e"], rows(values(3)["e"], ranks))

    together(2, work)


@pytest.mark.parametrize("read", [AdamW.load, saved_variables], ids=["load", "saved_variables"])
def test_an_index_of_petabytes(read, tmp_path):
    """It is compared with the files before any memory is taken."""
    folder = tmp_path / "state"
    saved(folder)

    def grow(document):
        variable = next(each for each in document["variables"] if each["name"] == "a")
        for each in (variable, *(document["arrays"][f"{slot}/a"] for slot in ("momentum", "velocity", "variables"))):
            each["shape"] = [3, 10**15]
        document["parts"]["a"] = [[rank, [rank, 0], [1, 10**15]] for rank in range(3)]

    _forge(folder, grow, None)
    with pytest.raises(CorruptFileError, match=r"state/rank-00000.* has \d+ bytes; expected at least 12000000000"):
        read(folder)


@pytest.mark.parametrize(
    ("moment", "at_fault"),
    [(moment, rank) for moment in ("before", "its file") for rank in range(3)] + [("the index", 0)],
)
def test_a_rank_that_cannot_save(moment, at_fault, tmp_path, monkeypatch):
    """What was saved before counts still, on all ranks, and a later save leaves nothing behind."""
    from adamw_numba.saving import archive, folders

    folder = tmp_path / "state"
    saved(folder)
    expected = saved_variables(folder)
    broken = []
    write, replacing = archive.write, folders.replacing

    def failing_write(target, *arguments):
        if broken and f"rank-{at_fault:05d}" in str(target):
            raise OSError("the disk is full")
        return write(target, *arguments)

    @contextlib.contextmanager
    def failing_index(path, durable):
        if broken:
            raise OSError("the disk is full")
        with replacing(path, durable) as temporary:
            yield temporary

    monkeypatch.setattr(archive, "write", failing_write if moment == "its file" else write)
    monkeypatch.setattr(folders, "replacing", failing_index if moment == "the index" else replacing)

    def work(ranks):
        run = Strips(lambda: AdamW(0.1), ranks)
        run.build(values(0))
        steps(run, 0, 3, "float32")
        broken.append(True)
        extra = object() if moment == "before" and ranks.rank == at_fault else None
        with pytest.raises((OSError, TypeError, RankError)) as caught:
            run.save(folder, extra=extra)
        assert isinstance(caught.value, RankError) == (ranks.rank != at_fault)
        found = saved_variables(folder)
        for name, array in expected.items():
            np.testing.assert_array_equal(found[name], array)
        ranks.gather(np.zeros(1))
        broken.clear()
        ranks.gather(np.zeros(1))
        run.save(folder)

    together(3, work)
    assert len(list(folder.iterdir())) == 4
    assert AdamW.load(folder, values(0)).iterations == 3


@pytest.mark.parametrize("target", ["state.npz", "state.zarr"])
def test_command_line(target, tmp_path, capsys):
    """One process makes one file of the folder: the whole arrays."""
    if target.endswith(".zarr"):
        pytest.importorskip("zarr")
    folder = tmp_path / "state"
    saved(folder)
    assert main(["inspect", str(folder)]) == 0
    table = capsys.readouterr().out
    assert "momentum/a" in table
    assert "(70, 3)" in table
    assert "in 3 files" in table
    assert main(["verify", str(folder)]) == 0
    assert main(["convert", str(folder), str(tmp_path / target)]) == 0
    expected, found = (AdamW.load(path, values(3)).state for path in (folder, tmp_path / target))
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array)
    assert found["momentum/a"].any()


MISFITS = {
    "another shape": (lambda v: v | {"e": np.zeros(999, "float32")}, "'e' was of shape (1000,), and is of shape (999,)"),
    "a dtype": (lambda v: v | {"e": v["e"].astype(float)}, "'e' was float32"),
    "a variable fewer": (lambda v: {n: x for n, x in v.items() if n != "e"}, "['e'], which are not among the variables of any"),
    "one more": (lambda v: v | {"new": np.zeros(3, "float32")}, "lacks the variables ['new']"),
}  # fmt: skip


@pytest.mark.parametrize("kind", ["shared", "strips"])
@pytest.mark.parametrize("misfit", MISFITS)
def test_variables_that_do_not_fit(misfit, kind, tmp_path):
    spoil, text = MISFITS[misfit]
    folder = tmp_path / "state"
    saved(folder)

    def work(ranks):
        run = KINDS[kind](lambda: AdamW(0.1), ranks)
        run.build(spoil(values(0)))
        with pytest.raises((ValueError, RankError), match=re.escape(text)):
            run.restore(folder)
        again = KINDS[kind](lambda: AdamW.load(folder), ranks)
        with pytest.raises((ValueError, RankError), match=re.escape(text)):
            again.build(spoil(values(0)))

    together(2, work)


def test_targets(tmp_path):
    """A file is for one process; a mapping is a rank's own; other things that stand in a folder are left alone."""
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").write_text("")

    def work(ranks):
        run = Strips(lambda: AdamW(0.1), ranks)
        run.build(values(0))
        for target, text in [("a.npz", "expected a path without suffix"), (3, "expected a path without suffix")]:
            with pytest.raises(ValueError, match=text):
                run.save(tmp_path / target if isinstance(target, str) else target)
        with pytest.raises((ValueError, RankError), match=r"holds \['thesis\.tex'\]"):
            run.save(tmp_path / "home")
        with pytest.raises((ValueError, RankError), match="path is"):
            run.save(tmp_path / f"own{ranks.rank}")
        with pytest.raises((ValueError, RankError), match=r"variables= is \[False, True\]"):
            run.save(tmp_path / "state", variables=bool(ranks.rank))
        with pytest.raises((FileNotFoundError, RankError)):
            run.save(tmp_path / "nowhere" / "state")
        run.optimizer.beta_1 = 0.9 - 0.1 * ranks.rank
        with pytest.raises(ValueError, match=r"the hyperparameters differ: beta_1 is 0\.9 on rank 0, 0\.8 on rank 1"):
            run.save(tmp_path / "state")
        run.optimizer.beta_1 = 0.9
        with pytest.raises(ValueError, match="expected a path without suffix"):
            run.save({})
        with pytest.raises((ValueError, RankError), match="`extra` is not the same on all ranks"):
            run.save(tmp_path / "state", extra=ranks.rank)
        with pytest.raises(ValueError, match="needs `variables`"):
            AdamW.load(tmp_path / "state", comm=ranks)
        with pytest.raises((FileNotFoundError, RankError), match="no such folder"):
            AdamW.load(tmp_path / "nowhere", run.variables, comm=ranks)
        with pytest.raises(ValueError, match="expected False"):
            Checkpoints(tmp_path / "c", suffix="", background=True)
        with pytest.raises(ValueError, match="expected '' and False"):
            Checkpoints(tmp_path / "c", background=True).save(run.optimizer, 1)

    together(2, work)


PIECES = {
    "no mapping": ([3], TypeError, "`pieces` is [3]"),
    "an unknown name": ({"x": slice(0, 2)}, ValueError, "`pieces` names 'x'"),
    "too few slices": ({"w": (slice(0, 2),)}, ValueError, "expected a slice of the whole variable"),
    "another length": ({"w": (slice(0, 3), slice(None))}, ValueError, "expected a slice of the whole variable"),
    "no slices": ({"w": (0, 1)}, ValueError, "expected a slice of the whole variable"),
    "a step": ({"w": (slice(0, 4, 2), slice(None))}, ValueError, "expected a slice of the whole variable"),
}  # fmt: skip


@pytest.mark.parametrize("case", PIECES)
def test_pieces_that_do_not_fit(case):
    pieces, kind, text = PIECES[case]

    def work(ranks):
        with pytest.raises((kind, RankError), match=re.escape(text)):
            AdamW().build({"w": np.ones((2, 3))}, comm=ranks, pieces=pieces if ranks.rank == 1 else None)

    together(2, work)


def test_a_piece_that_two_ranks_have():
    def work(ranks):
        with pytest.raises(RankError, match="the pieces of 'w' overlap, or leave gaps"):
            AdamW().build({"w": np.ones(6)}, comm=ranks, pieces={"w": slice(0, 6)})

    together(2, work)


def saved_alone(path, value):
    optimizer, variables = AdamW(0.1), {"w": np.full(4, value)}
    optimizer.build(variables)
    optimizer.apply([np.ones(4)])
    optimizer.save(path, variables=True)


def test_ranks_that_load_different_saves(tmp_path):
    for rank in range(2):
        saved_alone(tmp_path / f"{rank}.npz", float(rank))

    def work(ranks):
        variables = {"w": np.ones(4)}
        with pytest.raises(RankError, match="the ranks have loaded different saves"):
            AdamW.load(tmp_path / f"{ranks.rank}.npz", variables, comm=ranks, replicated=["w"])
        np.testing.assert_array_equal(variables["w"], np.ones(4))
        optimizer = AdamW.load(tmp_path / "0.npz", variables, comm=ranks, replicated=["w"])
        with pytest.raises(RankError, match="the ranks have read different saves"):
            optimizer.restore(tmp_path / f"{ranks.rank}.npz")
        optimizer.restore(tmp_path / "1.npz")

    together(2, work)


@pytest.mark.parametrize("spoil", ["variable", "momentum"])
def test_an_array_that_is_read_only_on_one_rank(spoil, tmp_path):
    saved_alone(tmp_path / "state.npz", 3.0)

    def work(ranks):
        variables = {"w": np.ones(4)}
        optimizer = AdamW(0.1)
        optimizer.build(variables, comm=ranks, replicated=["w"])
        array = variables["w"] if spoil == "variable" else optimizer.state["momentum/w"]
        array.flags.writeable = ranks.rank == 0
        with pytest.raises((ValueError, RankError), match="read-only"):
            optimizer.restore(tmp_path / "state.npz")
        np.testing.assert_array_equal(variables["w"], np.ones(4))
        assert not optimizer.state["momentum/w"].any()

    together(2, work)


def drift_of(name):
    def drift(optimizer):
        optimizer.state[name][...] += 1

    return drift


DRIFTS = {
    "the iteration": (drift_of("iteration"), "iteration is 1 on rank 0, 2 on rank 1"),
    "the rate": (drift_of("learning_rate"), r"learning_rate is 0\.1 on rank 0, 1\.1 on rank 1"),
    "a moment": (drift_of("velocity/w"), r"replicated variables differ: \['velocity/w'\] are others on rank 1"),
    "a variable": (lambda o: o.trainable_variables[0].fill(3), r"differ: \['variables/w'\] are others on rank 1"),
}


@pytest.mark.parametrize("case", DRIFTS)
def test_what_must_be_the_same_when_it_is_saved(case, tmp_path):
    drift, text = DRIFTS[case]

    def work(ranks):
        optimizer = AdamW(0.1)
        optimizer.build({"w": np.ones(4)}, comm=ranks, replicated=["w"])
        optimizer.apply([np.ones(4)])
        optimizer.save(tmp_path / "state", extra={"a": 1, "b": 2} if ranks.rank else {"b": 2, "a": 1})
        if ranks.rank:
            drift(optimizer)
        with pytest.raises((ValueError, RankError), match=text):
            optimizer.save(tmp_path / "state")
        AdamW.load(tmp_path / "state", {"w": np.ones(4)})

    together(2, work)


def test_two_programs_that_save_in_one_folder(tmp_path, monkeypatch):
    """The one whose files are gone says so; the other's save stays."""
    usual, saved = folders.archive.write, []

    def write(path, *rest):
        usual(path, *rest)
        if not saved:
            saved.append(path)
            run = AdamW(0.1)
            run.build({"w": np.full(4, 7.0)}, comm=One())
            run.save(tmp_path / "state", variables=True)

    monkeypatch.setattr(folders.archive, "write", write)
    optimizer = AdamW(0.1)
    optimizer.build({"w": np.ones(4)}, comm=One())
    with pytest.raises(FileNotFoundError, match="another program saves in the folder"):
        optimizer.save(tmp_path / "state", variables=True)
    np.testing.assert_array_equal(saved_variables(tmp_path / "state")["w"], np.full(4, 7.0))


class One:
    rank, size = 0, 1

    def gather(self, row):
        return row[None].copy()


def test_checkpoints_that_one_rank_cannot_list(tmp_path, monkeypatch):
    def work(ranks):
        optimizer = AdamW(0.1)
        optimizer.build({"w": np.ones(4)}, comm=ranks, replicated=["w"])
        checkpoints = Checkpoints(tmp_path / "run", suffix="")
        checkpoints.save(optimizer, 1)
        if ranks.rank:
            monkeypatch.setattr(checkpoints, "_steps", lambda: [][3])
        with pytest.raises((IndexError, RankError)):
            checkpoints.restore_latest(optimizer)
        with pytest.raises((ValueError, RankError), match="step"):
            checkpoints.save(optimizer, -1 if ranks.rank else 2)
        with pytest.raises(RuntimeError, match="is the copy of one that was connected"):
            Checkpoints(tmp_path / "run", suffix="").restore_latest(copy.deepcopy(optimizer))

    together(2, work)


def test_pieces_of_what_is_replicated():
    def work(ranks):
        with pytest.raises(ValueError, match="`pieces` names 'w', which is replicated"):
            AdamW().build({"w": np.ones(6)}, comm=ranks, replicated=["w"], pieces={"w": slice(0, 6)})

    together(2, work)


@pytest.mark.parametrize("between", [4, 8], ids=["overlap", "gap"])
def test_pieces_that_overlap_or_leave_gaps(between):
    def work(ranks):
        first = between * ranks.rank
        with pytest.raises(RankError, match="the pieces of 'w' overlap, or leave gaps"):
            AdamW().build({"w": np.ones(6)}, comm=ranks, pieces={"w": slice(first, first + 6)})
        starts = np.cumsum([0, 6, 6])  # NumPy's integers are integers
        pieces = {"w": slice(starts[ranks.rank], starts[ranks.rank + 1])}
        AdamW().build({"w": np.ones(6)}, comm=ranks, pieces=pieces)
        with pytest.raises(ValueError, match="expected a slice of the whole variable"):
            AdamW().build({"w": np.ones(6)}, comm=ranks, pieces={"w": slice(0.0, 6.0)})

    together(2, work)


def test_another_suffix(tmp_path):
    """Where there are checkpoints of another kind, nobody starts from scratch."""

    def work(ranks):
        run = Strips(lambda: AdamW(0.1), ranks)
        run.build(values(0))
        Checkpoints(tmp_path, suffix="").save(run.optimizer, 1)
        with pytest.raises(ValueError, match=r"nothing with the suffix '\.npz'"):
            Checkpoints(tmp_path).restore_latest(AdamW())

    together(1, work)


def test_checkpoints_of_another_kind(tmp_path):
    """Nobody learns only at the first save, after hours, that there can be none."""

    def work(ranks):
        run = Strips(lambda: AdamW(0.1), ranks)
        run.build(values(0))
        with pytest.raises(ValueError, match=r"`suffix` is '\.npz' and .* the optimizer is connected .* expected ''"):
            Checkpoints(tmp_path, every=100).save(run.optimizer, 1)
        with pytest.raises((ValueError, RankError), match=r"`suffix` is '\.npz'"):  # on rank 1 alone
            Checkpoints(tmp_path, suffix=".npz" * ranks.rank).save(run.optimizer, 1)

    together(2, work)
    alone = AdamW()
    alone.build({"w": np.ones(3)})
    with pytest.raises(ValueError, match=r"`suffix` is '', and the optimizer is not connected .* such as '\.npz'"):
        Checkpoints(tmp_path / "alone", every=100, suffix="").save(alone, 1)
    assert not any((tmp_path / "alone").iterdir())


def test_what_is_not_trainable_is_restored_on_all_ranks(tmp_path):
    def made(ranks, value):
        inner = AdamW(0.1)
        inner.override(var_names=["^f$"], trainable=False)
        sharded = Sharded(inner, ranks)
        variables = {"w": np.ones(300), "f": np.full(3, value)}
        sharded.build(variables)
        return sharded, variables

    def work(ranks):
        made(ranks, 7.0)[0].save(tmp_path / "state", variables=True)
        sharded, variables = made(ranks, 0.0)
        sharded.restore(tmp_path / "state")
        sharded.verify()
        loaded = Sharded(AdamW.load(tmp_path / "state"), ranks)
        again = {"w": np.zeros(300), "f": np.zeros(3)}
        loaded.build(again)
        loaded.verify()
        return variables["f"], again["f"]

    for found in together(3, work):
        np.testing.assert_array_equal(found, np.full((2, 3), 7.0))


def test_pieces_that_make_no_whole(tmp_path):
    """Ranks may have unrelated variables of one name: they are trained, but cannot be saved together."""

    def work(ranks):
        optimizer = AdamW()
        optimizer.build({"w": np.ones((2, 3 + ranks.rank))}, comm=ranks)
        optimizer.apply({"w": np.ones((2, 3 + ranks.rank))})
        with pytest.raises((ValueError, RankError), match="make no whole variable"):
            optimizer.save(tmp_path / "state")
        other = AdamW()
        with pytest.raises(RankError, match="`pieces` says nothing of 'w' on rank 1"):
            other.build({"w": np.ones(2)}, comm=ranks, pieces=None if ranks.rank else {"w": slice(0, 2)})

    together(2, work)

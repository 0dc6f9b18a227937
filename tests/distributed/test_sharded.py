"""Variables that all ranks have, each of which keeps the state of its share: the bits of one process."""

import copy
import functools
import pickle
import re
import threading
import tracemalloc

import numpy as np
import pytest
from helpers.thread_ranks import together
from hypothesis import given
from hypothesis import strategies as st

from adamw_numba import AdamW, LossScaleOptimizer, schedules
from adamw_numba.cpu import sums
from adamw_numba.distributed import RankError, Sharded
from adamw_numba.distributed.cuts import ALIGNED, buckets, shares
from adamw_numba.distributed.shares import Shares

SIZES = [1, 2, 3, 4, 7]
SHAPES = {"a": (70, 30), "b": (5,), "c": (), "d": (0, 3), "e": (1000,), "f": (3, 2, 2)}
STEPS = 5
OPTIONS = {
    "plain": {},
    "global clip": {"global_clipnorm": 0.5},
    "clip of each": {"clipnorm": 0.5},
    "clip of values": {"clipvalue": 0.5, "nesterov": True},
    "skip": {"nonfinite": "skip", "global_clipnorm": 0.5},
    "everything": {
        "global_clipnorm": 0.5, "amsgrad": True, "use_ema": True, "ema_overwrite_frequency": 3, "gradient_accumulation_steps": 2,
        "loss_scale_factor": 8.0, "nonfinite": "skip", "learning_rate": schedules.CosineDecay(0.1, 20),
    },
}  # fmt: skip


def values(seed, dtype):
    generator = np.random.default_rng(seed)
    found = {name: generator.standard_normal(shape) for name, shape in SHAPES.items()}
    return {name: np.asarray(value, dtype) for name, value in found.items()}


def gradients(step, dtype, rank=0):
    found = values(100 + 10 * step + rank, dtype)
    if step == 2:
        found["e"][999] = np.nan
    return found


def alone(options, dtype, gradient=gradients, names=SHAPES):
    variables = {name: value for name, value in values(0, dtype).items() if name in names}
    optimizer = AdamW(**{"learning_rate": 0.1, **options})
    optimizer.build(variables)
    for step in range(STEPS):
        optimizer.apply({name: value for name, value in gradient(step, dtype).items() if name in names})
    return variables, optimizer


def same(found, expected, rtol=0.0):
    for name, array in found.items():
        if rtol:
            np.testing.assert_allclose(array, expected[name], rtol=rtol, atol=rtol)
        else:
            np.testing.assert_array_equal(array, expected[name], err_msg=name)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "complex64"])
def test_the_bits_of_one_process(dtype, options, size):
    if dtype == "complex64":
        options = {key: value for key, value in options.items() if key != "amsgrad"}
    expected, optimizer = alone(options, dtype)

    def work(ranks):
        variables = values(0, dtype)
        sharded = Sharded(AdamW(**{"learning_rate": 0.1, **options}), ranks, gradients="reduced", bucket_bytes=1024)
        sharded.build(variables)
        for step in range(STEPS):
            sharded.apply(gradients(step, dtype))
        sharded.verify()
        return variables, sharded.optimizer

    for variables, each in together(size, work):
        same(variables, expected)
        assert each.iterations == optimizer.iterations
        assert each.skipped_steps == optimizer.skipped_steps


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(
    "options", [{"global_clipnorm": 0.5}, {"clipnorm": 0.5}, {"global_clipnorm": 0.5, "nonfinite": "skip"}], ids=str
)
@pytest.mark.parametrize("magnitude", [1.0, 1e-200, 1e200])
def test_norms_of_float64_that_are_cut(size, options, magnitude):
    """Their sums of chunks are gathered; out of a float64's range they are those of the ranks."""

    def run(optimizer):
        generator = np.random.default_rng(0)
        variables = {
            "a": generator.standard_normal((300, 301)),
            "b": generator.standard_normal(70_000),
            "c": np.ones(3),
        }
        variables["d"] = generator.standard_normal(40_000) + 1j
        optimizer.build(variables)
        for step in range(3):
            generator = np.random.default_rng(step)
            found = {name: magnitude * generator.standard_normal(v.shape) for name, v in variables.items()}
            found["b"][100:] *= step > 0  # some ranks have nothing but zeros
            optimizer.apply(found)
        return variables

    whole = AdamW(0.1, **options)
    expected = run(whole)

    def work(ranks):
        inner = AdamW(0.1, **options)
        found = run(Sharded(inner, ranks, gradients="reduced"))
        assert (inner.last_step.gradient_norm == whole.last_step.gradient_norm) or magnitude != 1
        return found

    for variables in together(size, work):
        same(variables, expected, rtol=0.0 if magnitude == 1 else 1e-12)


@pytest.mark.parametrize("mode", ["mean", "sum"])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "complex64"])
def test_gradients_are_added_in_the_order_of_the_ranks(dtype, size, mode):
    def added(step, dtype):
        slot = {"float16": np.float32}.get(dtype, dtype)
        each = [gradients(step, dtype, rank) for rank in range(size)]
        result = {}
        for name in SHAPES:
            total = np.array(each[0][name], slot)
            for other in each[1:]:
                total = total + other[name].astype(slot)
            parts = np.array(total).reshape(-1).view(np.float64 if dtype == "float64" else np.float32)
            if mode == "mean":
                parts /= parts.dtype.type(size)
            result[name] = parts.view(slot).reshape(total.shape)
        return result

    expected, optimizer = alone({"nonfinite": "skip"}, dtype, added)

    def work(ranks):
        variables = values(0, dtype)
        sharded = Sharded(AdamW(0.1, nonfinite="skip"), ranks, gradients=mode, bucket_bytes=1024)
        sharded.build(list(variables.items()))
        for step in range(STEPS):
            sharded.apply(gradients(step, dtype, ranks.rank))
        return variables, sharded.optimizer

    for variables, each in together(size, work):
        same(variables, expected)
        assert each.skipped_steps == optimizer.skipped_steps == 1


@pytest.mark.parametrize("size", [2, 3, 4, 7])
def test_what_is_kept_and_sent(size):
    count = 40_000

    def work(ranks):
        variables = [np.ones(count, np.float32), np.ones((300, 70), np.float32)]
        sharded = Sharded(AdamW(), ranks)
        sharded.build(variables)
        before = ranks.sent
        sharded.apply([np.ones_like(v) for v in variables])
        return ranks.sent - before, sum(a.nbytes for a in sharded.optimizer.variables)

    total = 4 * (count + 300 * 70)
    for sent, kept in together(size, work):
        assert sent <= 2 * (size - 1) / size * total * 1.001 + 4 * 2 * ALIGNED * size
        assert kept <= 2 * total / size + 4 * 2 * ALIGNED + 64


class Echo:
    """The first of several ranks, all of which say what this one says."""

    rank = 0

    def __init__(self, size):
        self.size = size

    def gather(self, row):
        return np.tile(row, (self.size, 1))

    def exchange(self, send, send_counts, receive, receive_counts):
        receive.reshape(self.size, -1)[:] = send[: send_counts[0]]

    def spread(self, parts):
        pass


@pytest.mark.parametrize("mode", ["mean", "reduced"])
@pytest.mark.parametrize("size", [2, 4])
def test_memory(size, mode):
    """A step takes the gradients of a share, and buckets."""
    variables = [np.ones((1000, 256), np.float32) for _ in range(8)]
    gradients = [np.ones_like(v) for v in variables]
    total, bucket = sum(v.nbytes for v in variables), 1 << 20
    sharded = Sharded(AdamW(threads=1), Echo(size), gradients=mode, bucket_bytes=bucket)
    sharded.build(variables)
    sharded.apply(gradients)
    tracemalloc.start()
    try:
        fresh = Sharded(AdamW(threads=1), Echo(size), gradients=mode, bucket_bytes=bucket)
        fresh.build(variables)
        before = tracemalloc.get_traced_memory()[0]
        tracemalloc.reset_peak()
        fresh.apply(gradients)
        peak = tracemalloc.get_traced_memory()[1] - before
    finally:
        tracemalloc.stop()
    assert peak <= total / size + 3 * bucket
    assert mode == "mean" or peak <= bucket


@given(
    sizes=st.lists(st.integers(0, 700), max_size=6),
    ranks=st.integers(1, 8),
    most=st.integers(1, 300),
)
def test_cuts_hold_every_element_once(sizes, ranks, most):
    parts = shares(sizes, ranks)
    cut = buckets(parts, most)
    for found in ([run for runs in parts for run in runs], [run for b in cut for runs in b for run in runs]):
        elements = [(run.variable, k) for run in found for k in range(run.start, run.stop)]
        assert sorted(elements) == [(i, k) for i, size in enumerate(sizes) for k in range(size)]
    assert all(sum(run.stop - run.start for run in runs) <= most for bucket in cut for runs in bucket)
    assert all(len({run.variable for run in runs}) == len(runs) for runs in parts)
    for runs in parts:
        assert abs(sum(run.stop - run.start for run in runs) - sum(sizes) / ranks) <= ALIGNED + 1


def test_torch_tensors():
    torch = pytest.importorskip("torch")
    names = ["a", "c", "e"]
    kinds = {"a": torch.float32, "c": torch.float32, "e": torch.bfloat16}

    def tensors(found):
        return {name: torch.from_numpy(np.array(found[name])).to(kinds[name]) for name in names}

    def run(optimizer):
        variables = {n: torch.nn.Parameter(v) for n, v in tensors(values(0, "float32")).items()}
        optimizer.build(variables)
        for step in range(4):
            optimizer.apply(tensors(gradients(step, "float32")))
        return variables

    expected = run(AdamW(0.1, global_clipnorm=1.0, nonfinite="skip"))
    for mode in "reduced", "mean":
        run_all = functools.partial(run_sharded, run, mode)
        for variables in together(2, run_all):
            for name, value in variables.items():
                assert torch.equal(value, expected[name]), (mode, name)
                assert value._version > 0


def run_sharded(run, mode, ranks):
    return run(Sharded(AdamW(0.1, global_clipnorm=1.0, nonfinite="skip"), ranks, gradients=mode))


def test_autograd_is_told_on_every_rank():
    torch = pytest.importorskip("torch")

    def work(ranks):
        weight = torch.nn.Parameter(torch.ones(200))
        sharded = Sharded(AdamW(0.1), ranks)
        sharded.build([weight])
        loss = (weight**2).sum()
        sharded.apply([torch.ones(200)])
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()

    together(3, work)


def test_gradients_that_are_missing():
    """A rank without one counts as zeros; a variable without one on all ranks is left alone."""

    def work(ranks):
        variables = values(0, "float32")
        sharded = Sharded(AdamW(0.1), ranks, gradients="sum")
        sharded.build(variables)
        given = gradients(0, "float32")
        given["b"] = given["b"] if ranks.rank == 1 else None
        given["e"] = None
        given |= {name: given[name] if ranks.rank == 0 else np.zeros_like(given[name]) for name in ("a", "c", "d", "f")}
        sharded.apply(given)
        return variables

    def expected(step, dtype):
        return {**gradients(0, dtype), "e": None}

    variables = values(0, "float32")
    optimizer = AdamW(0.1)
    optimizer.build(variables)
    with pytest.warns(UserWarning, match="Gradients do not exist"):
        optimizer.apply(expected(0, "float32"))
    with pytest.warns(UserWarning, match=r"Gradients do not exist for variables \['e'\]") as warned:
        ranks = together(3, work)
    assert len(warned) == 3
    for found in ranks:
        same(found, variables)


def test_overrides_and_frozen_variables():
    def run(optimizer, inner):
        variables = values(0, "float32")
        inner.override(var_list=[variables["e"]], learning_rate_multiplier=0.5)
        inner.override(var_names=["^b$"], weight_decay=0.0)
        inner.override(var_names=["^f$"], trainable=False)
        optimizer.build(variables)
        for step in range(2):
            optimizer.apply(gradients(step, "float32"))
        return variables

    inner = AdamW(0.1, weight_decay=0.1)
    expected = run(inner, inner)
    np.testing.assert_array_equal(expected["f"], values(0, "float32")["f"])

    def work(ranks):
        inner = AdamW(0.1, weight_decay=0.1)
        return run(Sharded(inner, ranks, gradients="reduced"), inner)

    for found in together(3, work):
        same(found, expected)


def test_nothing_is_trainable():
    def work(ranks):
        inner = AdamW(0.1)
        inner.override(var_names=["."], trainable=False)
        with pytest.raises(ValueError, match="no variable is trainable"):
            Sharded(inner, ranks).build([np.ones(3)])

    together(2, work)


def test_a_dynamic_loss_scale():
    def run(optimizer):
        variables = values(0, "float32")
        optimizer.build(variables)
        for step in range(4):
            optimizer.apply(gradients(step, "float32"))
        return variables

    def make():
        return LossScaleOptimizer(AdamW(0.1, global_clipnorm=1.0), initial_scale=4.0, dynamic_growth_steps=2)

    whole = make()
    expected = run(whole)

    def work(ranks):
        scaled = make()
        return run(Sharded(scaled, ranks, gradients="reduced")), scaled.dynamic_scale

    for found, scale in together(3, work):
        same(found, expected)
        assert scale == whole.dynamic_scale


def test_averages():
    variables, optimizer = alone({"use_ema": True, "nonfinite": "skip"}, "float32")
    with optimizer.averaged():
        expected = copy.deepcopy(variables)

    def work(ranks):
        variables = values(0, "float32")
        sharded = Sharded(AdamW(0.1, use_ema=True, nonfinite="skip"), ranks, gradients="reduced")
        sharded.build(variables)
        for step in range(STEPS):
            sharded.apply(gradients(step, "float32"))
        before = copy.deepcopy(variables)
        with sharded.averaged():
            inside = copy.deepcopy(variables)
        same(variables, before)
        return inside

    for found in together(3, work):
        same(found, expected)


FAULTS = {
    "a shape": (lambda g: g | {"a": g["a"][:2]}, "the gradient of 'a' has shape (2, 30); expected (70, 30)"),
    "a dtype of no float": (lambda g: g | {"a": g["a"].astype(int)}, "the gradient of 'a'"),
    "a name": (lambda g: g | {"nobody": g["a"]}, "nobody"),
    "no gradients at all": (lambda g: 3, "grads is 3 of type int"),
}


@pytest.mark.parametrize("mode", ["mean", "reduced"])
@pytest.mark.parametrize("at_fault", [0, 2])
@pytest.mark.parametrize("fault", FAULTS)
def test_an_error_on_one_rank(fault, at_fault, mode):
    """All raise, nothing is written, and all can go on."""
    spoil, text = FAULTS[fault]

    def work(ranks):
        variables = values(0, "float32")
        sharded = Sharded(AdamW(0.1), ranks, gradients=mode)
        sharded.build(variables)
        given = gradients(0, "float32")
        with pytest.raises((RankError, ValueError, TypeError), match=re.escape(text)) as caught:
            sharded.apply(spoil(given) if ranks.rank == at_fault else given)
        assert isinstance(caught.value, RankError) == (ranks.rank != at_fault)
        same(variables, values(0, "float32"))
        sharded.apply(given)
        sharded.verify()
        return variables

    found = together(3, work)
    for each in found[1:]:
        same(each, found[0])
    assert not np.array_equal(found[0]["a"], values(0, "float32")["a"])


@pytest.mark.parametrize(
    ("where", "mode"), [("prepare", "mean"), ("prepare", "sum"), ("of_own", "reduced"), ("add", "mean"), ("add", "sum")]
)
@pytest.mark.filterwarnings("ignore:Gradients do not exist")
@pytest.mark.parametrize("lacks", [(), ("b",)], ids=["all", "one lacks a gradient"])
def test_an_error_between_two_decisions(where, mode, lacks, monkeypatch):
    """As where memory is short: whatever a rank raises on the way to its step, the others are told."""

    def work(ranks):
        def fails(*given):
            if at_fault.is_set() and threading.current_thread() is thread[1]:
                raise MemoryError("no memory")
            return usual(*given)

        thread[ranks.rank] = threading.current_thread()
        if ranks.rank == 0:
            usual = getattr(sums if where == "add" else Shares, where)
            monkeypatch.setattr(sums if where == "add" else Shares, where, fails)
        variables = values(0, "float32")
        sharded = Sharded(AdamW(0.1), ranks, gradients=mode)
        sharded.build(variables)
        given = gradients(0, "float32")
        if mode != "reduced" and ranks.rank == 1:
            given |= dict.fromkeys(lacks)
        at_fault.set()
        with pytest.raises(RankError if ranks.rank != 1 else MemoryError, match="no memory"):
            sharded.apply(given)
        same(variables, values(0, "float32"))
        ranks.gather(np.zeros(1))
        at_fault.clear()
        ranks.gather(np.zeros(1))
        sharded.apply(given)
        sharded.verify()

    at_fault, thread = threading.Event(), [None] * 3
    together(3, work)


def test_nobody_is_warned_of_a_gradient_that_another_rank_has(recwarn):
    def work(ranks):
        variables = {"w": np.ones(100), "b": np.ones(3)}
        sharded = Sharded(AdamW(0.1), ranks)
        sharded.build(variables)
        sharded.apply({"w": np.ones(100), "b": np.ones(3) if ranks.rank else None})
        sharded.apply([np.ones(100), np.ones(3) if ranks.rank else None], variables)
        assert not np.array_equal(variables["b"], np.ones(3))

    together(2, work)
    assert not recwarn.list


@pytest.mark.parametrize("mode", ["mean", "reduced"])
def test_a_warning_that_is_an_error_on_one_rank(mode, monkeypatch):
    def work(ranks):
        variables = {"w": np.ones(100), "b": np.ones(3)}
        sharded = Sharded(AdamW(0.1), ranks, gradients=mode)
        sharded.build(variables)
        with pytest.raises(UserWarning if ranks.rank else RankError, match="Gradients do not exist"):
            sharded.apply({"w": np.ones(100), "b": None})
        np.testing.assert_array_equal(variables["w"], np.ones(100))

    def warn(*args, **options):
        if threading.current_thread() is not first:
            raise UserWarning(args[0])

    def remembered(ranks):
        nonlocal first
        first = threading.current_thread() if ranks.rank == 0 else first
        ranks.gather(np.zeros(1))
        work(ranks)

    first = None
    monkeypatch.setattr("warnings.warn", warn)
    together(2, remembered)


def test_calls_that_differ():
    def work(ranks):
        sharded = Sharded(AdamW(0.1, use_ema=True), ranks)
        sharded.build([np.ones(100)])
        with pytest.raises(
            RankError, match="the calls differ: apply of a Sharded on rank 0, verify of a Sharded on rank 1"
        ):
            sharded.apply([np.ones(100)]) if ranks.rank == 0 else sharded.verify()
        with pytest.raises(RankError, match="the calls differ"):
            if ranks.rank == 0:
                sharded.apply([np.ones(100)])
            else:
                with sharded.averaged():
                    pass
        sharded.apply([np.ones(100)])
        with sharded.averaged():
            pass
        sharded._engine.swapped = ranks.rank == 1
        with pytest.raises(RuntimeError, match="active already"), sharded.averaged():
            pass
        sharded._engine.swapped = False
        sharded.verify()

    together(2, work)


def test_a_variable_that_has_become_read_only():
    def work(ranks):
        variables = values(0, "float32")
        sharded = Sharded(AdamW(0.1), ranks)
        sharded.build(variables)
        variables["e"].flags.writeable = ranks.rank != 1
        with pytest.raises((ValueError, RankError), match="variable 'e' is read-only"):
            sharded.apply(gradients(0, "float32"))
        same(variables, values(0, "float32"))
        variables["e"].flags.writeable = True
        sharded.apply(gradients(0, "float32"))
        sharded.verify()

    together(3, work)


def test_what_the_optimizer_has():
    def work(ranks):
        sharded = Sharded(AdamW(0.1), ranks)
        with pytest.raises(AttributeError, match=r"has no attribute 'iterations': it is `optimizer\.iterations`"):
            _ = sharded.iterations
        with pytest.raises(AttributeError, match=r"has no attribute 'colour'$"):
            _ = sharded.colour
        with pytest.raises(AttributeError, match="'learning_rate' to set; set that of its `optimizer`"):
            sharded.learning_rate = 0.2
        assert not hasattr(sharded, "iterations")

    together(1, work)


DIFFERENT = {
    "a dtype": (lambda g: g | {"a": g["a"].astype("float32")}, "mean", "gradients of 'a' are ['float16', 'float32'"),
    "none": (lambda g: g | {"a": None}, "reduced", "gradients of 'a' are ['float16', None"),
}


@pytest.mark.parametrize("case", DIFFERENT)
@pytest.mark.filterwarnings("ignore:Gradients do not exist")
def test_gradients_that_differ_between_ranks(case):
    spoil, mode, text = DIFFERENT[case]

    def work(ranks):
        sharded = Sharded(AdamW(0.1), ranks, gradients=mode)
        sharded.build(values(0, "float16"))
        given = gradients(0, "float16")
        with pytest.raises(RankError, match=re.escape(text)):
            sharded.apply(spoil(given) if ranks.rank == 1 else given)

    together(3, work)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda g, k: g * (1 + k),
        lambda g, k: g * (-1) ** k,
        lambda g, k: g[::-1] if k else g,
        lambda g, k: g * (np.nan if k else 1),
    ],
)
def test_gradients_that_were_not_reduced(spoil):
    def work(ranks):
        sharded = Sharded(AdamW(0.1), ranks, gradients="reduced")
        sharded.build([np.ones(4000, np.float32)])
        gradient = np.random.default_rng(0).standard_normal(4000, np.float32)
        with pytest.raises(RankError, match="the gradients differ between the ranks"):
            sharded.apply([np.ascontiguousarray(spoil(gradient, ranks.rank))])
        sharded.apply([gradient])

    together(2, work)


VARIABLES = {
    "values": (lambda v: v | {"b": v["b"] + 1}, "the values of the variables differ: ['b'] on ranks 0 and 1"),
    "a shape": (lambda v: v | {"b": v["b"][:4].copy()}, "the variables differ: ['b', [5], 'float32', True] on rank 0"),
    "fewer": (
        lambda v: {n: x for n, x in v.items() if n != "f"},
        "['f', [3, 2, 2], 'float32', True] on rank 0, None on",
    ),
    "an order": (lambda v: v | {"a": np.asfortranarray(v["a"])}, "in the order of its axes"),
    "shared memory": (lambda v: v | {"z": v["a"][:1]}, "share memory"),
    "none": (lambda v: {}, "is empty"),
}


@pytest.mark.parametrize("case", VARIABLES)
def test_variables_that_ranks_cannot_share(case):
    spoil, text = VARIABLES[case]

    def work(ranks):
        variables = values(0, "float32")
        sharded = Sharded(AdamW(0.1), ranks)
        with pytest.raises((RankError, ValueError), match=re.escape(text)):
            sharded.build(spoil(variables) if ranks.rank == 1 else variables)
        assert not sharded.optimizer.built
        sharded.build(variables)

    together(3, work)


@pytest.mark.parametrize(("option", "values"), [("gradients", ["mean", "sum"]), ("bucket_bytes", [1024, 4096])])
def test_arguments_that_differ(option, values):
    def work(ranks):
        sharded = Sharded(AdamW(0.1), ranks, **{option: values[ranks.rank]})
        with pytest.raises(RankError, match=f"'{option}', {values[0]!r}"):
            sharded.build([np.ones(300)])

    together(2, work)


def test_a_difference_that_arises_later():
    def work(ranks):
        variables = values(0, "float32")
        sharded = Sharded(AdamW(0.1), ranks)
        sharded.build(variables)
        sharded.verify()
        variables["e"][3] += ranks.rank == 2
        with pytest.raises(RankError, match=r"\['e'\] on ranks 0 and 2"):
            sharded.verify()

    together(3, work)


def test_memory_that_moves_and_variables_that_thaw():
    torch = pytest.importorskip("torch")

    def work(ranks):
        moved, frozen = torch.ones(100), torch.ones(3)
        inner = AdamW(0.1)
        inner.override(var_names=["frozen"], trainable=False)
        sharded = Sharded(inner, ranks)
        sharded.build({"w": moved, "frozen": frozen})
        has_it = "frozen" in [name for group in inner.groups for name in group.names]  # one of the ranks has
        if has_it:
            inner.group_of("frozen").trainable = True
        with pytest.raises((RankError, ValueError), match="'frozen' was not trainable at `build`"):
            sharded.apply({"w": torch.ones(100)})
        if has_it:
            inner.group_of("frozen").trainable = False
        sharded.apply({"w": torch.ones(100)})
        moved.data = torch.ones(100)
        with pytest.raises(ValueError, match="'w' lies elsewhere in memory"):
            sharded.apply({"w": torch.ones(100)})

    together(2, work)


class Gathers:
    rank, size = 0, 1

    def gather(self, row):
        return row[None]


ARGUMENTS = {
    "no optimizer": (lambda r: Sharded(3, r), TypeError, "`optimizer` is 3 of type int"),
    "a built one": (lambda r: Sharded(_built(), r), ValueError, "is built"),
    "no communicator": (lambda r: Sharded(AdamW(), 3), TypeError, "`comm` is 3"),
    "one that gathers alone": (lambda r: Sharded(AdamW(), Gathers()), TypeError, "exchanges no bytes"),
    "gradients": (lambda r: Sharded(AdamW(), r, gradients="average"), ValueError, "`gradients`"),
    "bucket_bytes": (lambda r: Sharded(AdamW(), r, bucket_bytes=3), ValueError, "`bucket_bytes`"),
    "no build": (lambda r: Sharded(AdamW(), r).apply([np.ones(2)]), ValueError, "Call `build(variables)` first"),
    "a copy": (lambda r: copy.deepcopy(Sharded(AdamW(), r)), TypeError, "cannot be copied"),
    "a pickle": (lambda r: pickle.dumps(Sharded(AdamW(), r)), TypeError, "cannot be copied or pickled"),
}  # fmt: skip


def _built():
    optimizer = AdamW()
    optimizer.build([np.ones(2)])
    return optimizer


@pytest.mark.parametrize("case", ARGUMENTS)
def test_arguments(case):
    call, kind, text = ARGUMENTS[case]

    def work(ranks):
        with pytest.raises(kind, match=re.escape(text)):
            call(ranks)

    together(1, work)

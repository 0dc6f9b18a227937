"""Steps of several ranks, each with a part of the variables: those of one process with all of them, bit for bit."""

import copy
import math
import pickle
import re

import numpy as np
import pytest
from helpers.thread_ranks import on_ranks, together

from adamw_numba import AdamW, LossScaleOptimizer, schedules
from adamw_numba.cpu import exact
from adamw_numba.distributed import RankError
from adamw_numba.ranks.meeting import SAMPLED

SIZES = [1, 2, 3, 4, 7]
SHAPES = {"a": (70, 30), "b": (5,), "c": (), "d": (0, 3), "e": (1000,), "f": (3, 2, 2)}
OPTIONS = {
    "plain": {},
    "global clip": {"global_clipnorm": 0.5},
    "global clip that is not reached": {"global_clipnorm": 1e6},
    "clip of each": {"clipnorm": 0.5},
    "skip": {"nonfinite": "skip", "global_clipnorm": 0.5},
    "everything": {
        "global_clipnorm": 0.5, "amsgrad": True, "use_ema": True, "gradient_accumulation_steps": 2, "loss_scale_factor": 8.0,
        "nonfinite": "skip", "learning_rate": schedules.CosineDecay(0.1, 20),
    },
}  # fmt: skip
STEPS = 6


def values(seed, dtype):
    generator = np.random.default_rng(seed)
    found = {name: generator.standard_normal(shape) for name, shape in SHAPES.items()}
    return {name: np.asarray(value, dtype) for name, value in found.items()}


def owner(name, size):
    return sorted(SHAPES).index(name) % size


def part(tree, rank, size, shared=()):
    return {name: array for name, array in tree.items() if owner(name, size) == rank or name in shared}


def alone(options, dtype, steps=STEPS, bad=()):
    """All variables in one process."""
    variables = values(0, dtype)
    optimizer = AdamW(**{"learning_rate": 0.1, **options})
    optimizer.build(variables)
    for step in range(steps):
        optimizer.apply(gradients(step, dtype, bad))
    return variables, optimizer


def gradients(step, dtype, bad=()):
    found = values(100 + step, dtype)
    if step in bad:
        found["e"][7] = np.nan
    return found


def ranks_of(size, options, dtype, shared=(), steps=STEPS, bad=()):
    """Each rank with its own variables, and the shared ones."""

    def work(ranks):
        variables = part(values(0, dtype), ranks.rank, size, shared)
        optimizer = AdamW(**{"learning_rate": 0.1, **options})
        optimizer.build(variables, comm=ranks, replicated=[f"^{name}$" for name in shared])
        for step in range(steps):
            optimizer.apply(part(gradients(step, dtype, bad), ranks.rank, size, shared))
        return variables, optimizer, ranks.messages

    found = on_ranks(size, work)
    for each in found:
        if isinstance(each, BaseException):
            raise each
    return found


def same(found, expected, rtol=0.0):
    for variables, *_ in found:
        for name, array in variables.items():
            if rtol:
                np.testing.assert_allclose(array, expected[name], rtol=rtol, atol=rtol)
            else:
                np.testing.assert_array_equal(array, expected[name], err_msg=name)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("dtype", ["float32", "float64", "float16"])
def test_the_bits_of_one_process(dtype, options, size):
    expected, optimizer = alone(options, dtype)
    found = ranks_of(size, options, dtype, shared=("b",))
    same(found, expected, rtol=1e-12 if dtype == "float64" else 0.0)
    for _, each, _ in found:
        assert each.iterations == optimizer.iterations
        norm, wanted = each.last_step.gradient_norm, optimizer.last_step.gradient_norm
        assert norm == (wanted if wanted is None else pytest.approx(wanted, rel=1e-13))


@pytest.mark.parametrize("size", SIZES)
def test_a_cut_variable_is_clipped_by_its_whole_norm(size):
    whole, gradient = np.ones((11, 3), np.float32), np.random.default_rng(0).standard_normal((11, 3)).astype("float32")
    optimizer = AdamW(0.1, clipnorm=0.3)
    optimizer.build({"w": whole})
    optimizer.apply({"w": gradient})

    def work(ranks):
        rows = np.array_split(np.arange(11), size)[ranks.rank]
        piece = np.ones((len(rows), 3), np.float32)
        optimizer = AdamW(0.1, clipnorm=0.3)
        optimizer.build({"w": piece}, comm=ranks)
        optimizer.apply({"w": gradient[rows]})
        return piece

    np.testing.assert_array_equal(np.concatenate(on_ranks(size, work)), whole)


@pytest.mark.parametrize("size", [1, 3, 7])
@pytest.mark.parametrize("name", ["global clip", "clip of each"])
def test_norms_that_no_rank_is_certain_of(name, size, monkeypatch):
    """Their exact sums are gathered."""
    expected, _ = alone(OPTIONS[name], "float32")
    monkeypatch.setattr(exact, "IN_CHUNK", 2**50)
    same(ranks_of(size, OPTIONS[name], "float32", shared=("a",)), expected)


def test_frozen_variables_do_not_count():
    def work(ranks):
        variables = {"frozen": np.ones(2), "w": np.ones(2), f"own{ranks.rank}": np.ones(2)}
        optimizer = AdamW(0.1, clipnorm=1.0)
        optimizer.override(var_names=["^frozen$"], trainable=False)
        optimizer.build(variables, comm=ranks)
        optimizer.apply({name: np.full(2, 4.0) for name in variables if name != "frozen"})
        return optimizer.state["momentum/w"], optimizer.state[f"momentum/own{ranks.rank}"]

    for cut, own in on_ranks(2, work):  # the parts of `w` are two of four elements
        np.testing.assert_allclose(cut, 0.1 * 4 / 8)
        np.testing.assert_allclose(own, 0.1 * 4 / math.sqrt(32))


def test_calls_that_differ():
    def work(ranks):
        optimizer = AdamW()
        optimizer.build([np.ones(2)], comm=ranks)
        with pytest.raises(RankError, match="the calls differ: apply on rank 0, build on rank 1"):
            optimizer.apply([np.ones(2)]) if ranks.rank == 0 else AdamW().build([np.ones(2)], comm=ranks)

    assert on_ranks(2, work) == [None, None]


def test_two_optimizers_whose_steps_are_taken_in_another_order():
    def work(ranks):
        both = [AdamW(0.1), AdamW(0.1)]
        for optimizer in both:
            optimizer.build([np.ones(2)], comm=ranks)
        with pytest.raises(RankError, match=r"the calls differ: apply of optimizer [0-9a-f]+ on rank 0, apply of"):
            both[ranks.rank].apply([np.ones(2)])
        for optimizer in both:
            optimizer.apply([np.ones(2)])

    together(2, work)


@pytest.mark.parametrize("built", [(0,), (0, 1)])
def test_what_is_built_already_cannot_be_connected(built):
    def work(ranks):
        optimizer, variables = AdamW(), [np.ones(2)]
        if ranks.rank in built:
            optimizer.build(variables)
        with pytest.raises((ValueError, RankError), match="`comm` is given, and the optimizer is built already"):
            optimizer.build(variables, comm=ranks)

    together(2, work)


@pytest.mark.parametrize("kind", [AdamW, LossScaleOptimizer])
@pytest.mark.parametrize("pairs", [[(np.ones(2),)], [], 3, "raises"], ids=str)
def test_pairs_that_are_none_on_one_rank(kind, pairs):
    def raises():
        yield 1 / 0

    def work(ranks):
        optimizer, variable = AdamW(), np.ones(2)
        optimizer = optimizer if kind is AdamW else kind(optimizer)
        optimizer.build([variable], comm=ranks)
        good = [(np.ones(2), variable)]
        with pytest.raises((ValueError, TypeError, ZeroDivisionError, RankError)) as caught:
            optimizer.apply_gradients((raises() if pairs == "raises" else pairs) if ranks.rank == 1 else good)
        assert isinstance(caught.value, RankError) == (ranks.rank != 1)
        optimizer.apply_gradients(good)
        assert optimizer.iterations == 1

    together(2, work)


def test_a_dynamic_scale_out_of_range_on_one_rank():
    def work(ranks):
        optimizer = LossScaleOptimizer(AdamW())
        optimizer.build([np.ones(2)], comm=ranks)
        if ranks.rank:
            optimizer.scale_state.scalars["dynamic_scale"][...] = np.inf
        with pytest.raises((ValueError, RankError), match="dynamic_scale"):
            optimizer.apply([np.ones(2)])

    together(2, work)


def test_an_iteration_that_is_read_only_on_one_rank():
    def work(ranks):
        optimizer, variable = AdamW(), np.ones(2)
        optimizer.build([variable], comm=ranks)
        optimizer.apply([np.ones(2)])
        before = variable.copy()
        optimizer.state["iteration"].flags.writeable = ranks.rank == 0
        with pytest.raises((ValueError, RankError), match="the iteration is 1 or read-only"):
            optimizer.apply([np.ones(2)])
        np.testing.assert_array_equal(variable, before)

    together(2, work)


def test_a_group_that_was_frozen_meanwhile_on_one_rank():
    def work(ranks):
        optimizer = AdamW()
        optimizer.override(var_names=["b"], trainable=True, weight_decay=0.0)
        optimizer.build({"w": np.ones(2), "b": np.ones(2)}, comm=ranks, replicated=["b"])
        optimizer.apply([np.ones(2), np.ones(2)])
        if ranks.rank:
            optimizer.groups[1].trainable = False
            optimizer.groups[1].trainable = True
        with pytest.raises(RankError, match=r"groups\[1\].started is 0 on rank 0, 1 on rank 1"):
            optimizer.apply([np.ones(2), np.ones(2)])

    together(2, work)


def test_replicated_variables_in_any_order():
    """And gradients that differ in the sign of a zero alone."""

    def work(ranks):
        names = ["a", "b"][:: 1 - 2 * ranks.rank]
        variables = {name: np.ones(3) for name in names}
        optimizer = AdamW(0.1)
        optimizer.build(variables, comm=ranks, replicated=["."])
        gradients = {"a": np.arange(3.0), "b": np.zeros(3) * (1 - 2 * ranks.rank)}
        for _ in range(3):
            optimizer.apply({name: gradients[name] for name in names})
        return variables

    first, second = together(2, work)
    assert all(np.array_equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("bad", [(0,), (2, 3), (5,)])
@pytest.mark.parametrize("size", SIZES)
def test_a_step_that_one_rank_skips_all_skip(size, bad):
    options = OPTIONS["skip"]
    expected, optimizer = alone(options, "float32", bad=bad)
    found = ranks_of(size, options, "float32", bad=bad)
    same(found, expected)
    assert {each.skipped_steps for _, each, _ in found} == {optimizer.skipped_steps} == {len(bad)}


def test_a_dynamic_loss_scale_is_the_same_on_all_ranks():
    def work(ranks):
        optimizer = LossScaleOptimizer(AdamW(0.1), initial_scale=2.0**10)
        variables = part(values(0, "float32"), ranks.rank, ranks.size)
        optimizer.inner_optimizer.build(variables, comm=ranks)
        for step in range(4):
            optimizer.apply(part(gradients(step, "float32", bad=(1, 2)), ranks.rank, ranks.size))
        return float(optimizer.dynamic_scale), optimizer.iterations

    assert set(on_ranks(3, work)) == {(2.0**8, 2)}


@pytest.mark.parametrize("size", SIZES)
def test_what_is_sent(size):
    """One message of at most 128 bytes for a step, whatever there is to agree on; one more to clip variables alone."""
    for name, expected in {"global clip": 1, "plain": 1, "clip of each": 2}.items():
        _, _, messages = ranks_of(size, OPTIONS[name], "float32", steps=0)[0]
        before = len(messages)
        _, _, messages = ranks_of(size, OPTIONS[name], "float32", steps=5)[0]
        sent = messages[before:]
        assert len(sent) == 5 * expected
        assert max(sent[::expected]) * 8 <= 128


# Ranks without anything


def test_a_rank_without_variables_or_gradients():
    def work(ranks):
        variables = {"w": np.ones(3)} if ranks.rank == 1 else {"v": np.ones(2)} if ranks.rank == 2 else {}
        optimizer = AdamW(0.1, global_clipnorm=1.0)
        optimizer.build(variables, comm=ranks)
        gradients = {"w": np.full(3, 2.0)} if ranks.rank == 1 else {"v": None} if ranks.rank == 2 else {}
        optimizer.apply(gradients)
        return variables, optimizer.iterations, optimizer.last_step.gradient_norm

    (nothing, *rest), (moved, *others), (still, *last) = on_ranks(3, work)
    assert nothing == {}
    assert (moved["w"] < 1).all()
    assert (still["v"] == 1).all()
    assert rest == others == last == [1, pytest.approx(math.sqrt(12))]


def test_no_rank_has_anything():
    errors = on_ranks(2, lambda ranks: AdamW().build({}, comm=ranks))
    assert all("empty on all ranks" in str(error) for error in errors)

    def work(ranks):
        optimizer = AdamW()
        optimizer.build({"w": np.ones(2)}, comm=ranks)
        optimizer.apply({"w": None})

    assert all("on any rank" in str(error) for error in on_ranks(2, work))


# Errors


def failing(change, size=3, at=1, **options):
    """What each of some ranks raises where one of them does something else; nothing has been written, and they go on."""

    def work(ranks):
        name = f"w{ranks.rank}"
        variables = {name: np.ones(4), "shared": np.ones(2)}
        optimizer = AdamW(**{"learning_rate": 0.1, "global_clipnorm": 1.0, **options})
        optimizer.override(var_names=["shared"], beta_1=0.8)
        optimizer.build(variables, comm=ranks, replicated=["shared"])
        good = {name: np.ones(4), "shared": np.ones(2)}
        optimizer.apply(good)
        before, state = copy.deepcopy(variables), copy.deepcopy(optimizer.state)
        undo, gradients = lambda: None, good
        if ranks.rank == at:
            gradients, undo = change(optimizer, dict(good), name)
        with pytest.raises(Exception) as error:  # noqa: PT011 - its type and text are looked at by the caller
            optimizer.apply(gradients)
        undo()
        for found, wanted in ((variables, before), (optimizer.state, state)):
            assert all(np.array_equal(found[key], wanted[key]) for key in wanted)
        optimizer.apply(good)
        return error.value, optimizer.iterations

    found = on_ranks(size, work)
    assert [each[1] for each in found] == [2] * size
    return [each[0] for each in found]


def setting(name, value):
    def change(optimizer, gradients, _):
        old = getattr(optimizer, name)
        setattr(optimizer, name, value)
        return gradients, lambda: setattr(optimizer, name, old)

    return change


def of_the_group(name, value):
    def change(optimizer, gradients, _):
        group = optimizer.group_of("shared")
        own = dict(vars(group)["own"])
        setattr(group, name, value)

        def undo():
            vars(group)["own"] = own
            optimizer.engine.hyper.token = object()

        return gradients, undo

    return change


def with_gradient(value):
    return lambda optimizer, gradients, name: (gradients | {name: value}, lambda: None)


AT_FAULT = {
    "a shape": (with_gradient(np.ones(9)), ValueError, "has shape"),
    "no array": (with_gradient("text"), TypeError, "text"),
    "a name": (lambda o, gradients, _: (gradients | {"other": np.ones(2)}, lambda: None), ValueError, "other"),
    "no container": (lambda *_: (3.0, lambda: None), TypeError, "grads"),
    "a rate that raises": (setting("learning_rate", lambda: 1 / 0), ZeroDivisionError, "division"),
}


@pytest.mark.parametrize("at", range(3))
@pytest.mark.parametrize("case", AT_FAULT)
def test_the_rank_at_fault_raises_its_own_error(case, at):
    change, kind, message = AT_FAULT[case]
    for rank, error in enumerate(failing(change, at=at)):
        assert message in str(error)
        if rank == at:
            assert isinstance(error, kind)
            assert not isinstance(error, RankError)
        else:
            assert isinstance(error, RankError)
            assert f"rank {at}: {kind.__name__}: " in str(error)
            assert "nothing has been written" in str(error)


def moved_on(optimizer, gradients, _):
    optimizer.engine.state.scalars["iteration"][...] = 7
    return gradients, lambda: optimizer.engine.state.scalars["iteration"].fill(1)


DISAGREE = {
    "iteration": (moved_on, "the iterations differ: 1 on ranks 0, 2, 7 on rank 1"),
    "learning rate": (setting("learning_rate", 0.2), "the learning rates differ: 0.1 on ranks 0, 2, 0.2 on rank 1"),
    "weight decay": (setting("weight_decay", 0.5), "the weight decays differ: 0.004 on ranks 0, 2, 0.5 on rank 1"),
    "hyperparameters": (setting("beta_1", 0.5), "the hyperparameters differ: beta_1 is 0.9 on ranks 0, 2, 0.5 on rank 1"),
    "a clip": (setting("global_clipnorm", None), "global_clipnorm is 1.0 on ranks 0, 2, None on rank 1"),
    "a replicated gradient": (
        lambda o, gradients, _: (gradients | {"shared": np.ones(2) * 2}, lambda: None),
        "the gradients of the replicated variables differ: that of 'shared' is another one on rank 1 than on rank 0",
    ),
    "a loss scale": (setting("loss_scale_factor", 4.0), "loss_scale is 1.0 on ranks 0, 2, 4.0 on rank 1"),
    "a group's own": (of_the_group("beta_1", 0.5), "groups[1].beta_1 is 0.8 on ranks 0, 2, 0.5 on rank 1"),
    "a group's rate": (
        of_the_group("learning_rate", 0.5),
        "the rates of the groups differ: groups[1].learning_rate is 0.1 on ranks 0, 2, 0.5 on rank 1",
    ),
    "a group's clip": (of_the_group("clipvalue", 0.5), "groups[1].clipvalue is None on ranks 0, 2, 0.5 on rank 1", None),
}  # fmt: skip


@pytest.mark.parametrize("case", DISAGREE)
def test_ranks_that_do_not_agree(case):
    change, message, *clip = DISAGREE[case]
    for error in failing(change, **({"global_clipnorm": None} if clip else {})):
        assert isinstance(error, RankError)
        assert message in str(error)


SHARED = np.array([3.0, -4.0, 0.0])
OTHER_SHARED = {"of other order": SHARED[::-1], "of other sign": -SHARED, "of another element": SHARED + [0, 0, 1], "none": None}  # fmt: skip


@pytest.mark.filterwarnings("ignore:Gradients do not exist")
@pytest.mark.parametrize("options", [{}, {"global_clipnorm": 1.0}], ids=str)
@pytest.mark.parametrize("case", OTHER_SHARED)
def test_replicated_gradients_that_differ(case, options):
    """Where no norm is taken too, and where the norms are the same."""

    def work(ranks):
        variables = {f"w{ranks.rank}": np.ones(4), "shared": np.ones(3)}
        optimizer = AdamW(0.1, **options)
        optimizer.build(variables, comm=ranks, replicated=["shared"])
        gradients = {f"w{ranks.rank}": np.ones(4), "shared": SHARED}
        optimizer.apply(gradients)
        before = variables["shared"].copy()
        with pytest.raises(RankError, match="the gradients of the replicated variables differ"):
            optimizer.apply(gradients | ({"shared": OTHER_SHARED[case]} if ranks.rank == 1 else {}))
        np.testing.assert_array_equal(variables["shared"], before)
        optimizer.apply(gradients)
        return variables["shared"]

    first, second = together(2, work)
    np.testing.assert_array_equal(first, second)


def test_every_element_of_a_replicated_gradient_is_compared_in_time():
    def work(ranks):
        optimizer = AdamW(0.1)
        optimizer.build({"shared": np.ones(1000)}, comm=ranks, replicated=["shared"])
        gradient = np.ones(1000)
        gradient[777] += ranks.rank
        with pytest.raises(RankError, match="the gradients of the replicated variables differ"):
            for _ in range(1000 // SAMPLED):
                optimizer.apply([gradient])

    together(2, work)


def test_a_dynamic_loss_scale_on_one_rank_alone():
    def work(ranks):
        optimizer = AdamW(0.1)
        if ranks.rank:
            optimizer = LossScaleOptimizer(optimizer)
        optimizer.build({f"w{ranks.rank}": np.ones(2)}, comm=ranks)
        with pytest.raises(
            RankError, match=r"nonfinite is 'propagate' on rank 0, 'skip' on rank 1; loss_scale is 1\.0 on"
        ):
            optimizer.apply([np.ones(2)])
        assert optimizer.iterations == 0

    together(2, work)


@pytest.mark.parametrize("at", range(3))
def test_not_finite_with_raise(at):
    for rank, error in enumerate(failing(with_gradient(np.full(4, np.inf)), at=at, nonfinite="raise")):
        assert f"gradients of ['w{at}'] hold values" in str(error)
        assert isinstance(error, FloatingPointError if rank == at else RankError)


@pytest.mark.parametrize("at", range(3))
def test_an_interrupt_on_one_rank(at):
    def interrupted(optimizer, gradients, name):
        def rate():
            raise KeyboardInterrupt

        return setting("learning_rate", rate)(optimizer, gradients, name)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pytest, "raises", lambda _: _Caught())
        errors = failing(interrupted, at=at)
    assert [type(error) for error in errors] == [KeyboardInterrupt if rank == at else RankError for rank in range(3)]


class _Caught:
    """As `pytest.raises` of any exception, interrupts among them."""

    def __enter__(self):
        return self

    def __exit__(self, kind, value, traceback):
        self.value = value
        return True


BUILT_WRONG = {
    "no variable of a kind": (lambda ranks: {"w": "text"}, {}, TypeError, "text"),
    "an error of the user's": (lambda ranks: {"w": np.ones(2, int)}, {}, TypeError, "int64"),
    "another replicated shape": (lambda ranks: {"b": np.ones(3)}, {}, RankError, "the replicated variables differ"),
    "another setting": (lambda ranks: {"b": np.ones(2)}, {"amsgrad": True}, RankError, "amsgrad is False on ranks 0, 2, True on rank 1"),
}  # fmt: skip


@pytest.mark.parametrize("case", BUILT_WRONG)
def test_what_is_built_has_to_fit(case):
    change, options, kind, message = BUILT_WRONG[case]

    def work(ranks):
        at_fault = ranks.rank == 1
        optimizer = AdamW(**options if at_fault else {})
        with pytest.raises(Exception) as error:  # noqa: PT011
            optimizer.build(change(ranks) if at_fault else {"b": np.ones(2)}, comm=ranks, replicated=["b"])
        assert not optimizer.built
        optimizer = AdamW()
        optimizer.build({"b": np.ones(2)}, comm=ranks, replicated=["b"])
        return error.value

    for rank, error in enumerate(on_ranks(3, work)):
        assert isinstance(error, kind if rank == 1 else RankError)
        assert message in str(error)


@pytest.mark.parametrize("comm", [3, "world", object(), [1], AdamW])
def test_what_is_no_communicator(comm):
    with pytest.raises(TypeError, match=r"`comm` is .*; expected a communicator of mpi4py, a process group"):
        AdamW().build([np.ones(2)], comm=comm)


@pytest.mark.parametrize(("replicated", "kind"), [("b", TypeError), ([3], TypeError), (["("], ValueError)])
def test_patterns_that_are_none(replicated, kind):
    errors = on_ranks(1, lambda ranks: AdamW().build([np.ones(2)], comm=ranks, replicated=replicated))
    assert isinstance(errors[0], kind)
    assert "`replicated`" in str(errors[0])


def test_a_copy_cannot_go_on_with_the_others():
    def work(ranks):
        optimizer = AdamW()
        optimizer.build([np.ones(2)], comm=ranks)
        assert f"rank={ranks.rank} of 2" in repr(optimizer)
        for other in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
            with pytest.raises(RuntimeError, match="is the copy of one that was connected"):
                other.apply([np.ones(2)])
        optimizer.apply([np.ones(2)])
        return optimizer.iterations

    assert on_ranks(2, work) == [1, 1]


def test_a_pattern_that_matches_on_another_rank_is_no_mistake(recwarn):
    def work(ranks):
        optimizer = AdamW()
        optimizer.exclude_from_weight_decay(var_names=["^w1$"])
        optimizer.build({f"w{ranks.rank}": np.ones(2)}, comm=ranks)

    assert on_ranks(3, work) == [None] * 3
    assert not recwarn.list


def test_all_ranks_have_the_same_groups():
    """One of which a rank has no variable is empty there, and is written on all ranks alike."""

    def work(ranks):
        optimizer = AdamW(0.1)
        optimizer.override(var_names=["bias"], weight_decay=0.0)
        optimizer.override(var_names=["kernel"], learning_rate_multiplier=0.5, clipnorm=1.0)
        variables = {"kernel": np.ones(2, np.float32)} | ({"bias": np.ones(1, np.float32)} if ranks.rank == 1 else {})
        optimizer.build(variables, comm=ranks)
        gradients = {name: np.ones_like(v) for name, v in variables.items()}
        optimizer.apply(gradients)
        groups = optimizer.groups
        assert [group.learning_rate_multiplier for group in groups] == [1.0, 0.5, 1.0]
        assert groups[2].names == (("bias",) if ranks.rank == 1 else ())
        assert optimizer.group_of("bias") is groups[2]
        if ranks.rank == 1:
            optimizer.group_of("bias").learning_rate = 0.3
        with pytest.raises(RankError, match="the rates of the groups differ"):
            optimizer.apply(gradients)
        optimizer.group_of("bias").learning_rate = 0.3
        optimizer.apply(gradients)
        with pytest.raises(KeyError, match="no variable 'other'"):
            optimizer.group_of("other")
        assert repr(groups[2]).startswith("Group(['bias']" if ranks.rank == 1 else "Group([]")
        return variables

    one = {"kernel": np.ones(4, np.float32), "bias": np.ones(1, np.float32)}
    optimizer = AdamW(0.1)
    optimizer.override(var_names=["bias"], weight_decay=0.0)
    optimizer.override(var_names=["kernel"], learning_rate_multiplier=0.5, clipnorm=1.0)
    optimizer.build(one)
    for rate in (0.1, 0.3):
        optimizer.group_of("bias").learning_rate = rate
        optimizer.apply({name: np.ones_like(v) for name, v in one.items()})
    found = together(2, work)
    np.testing.assert_array_equal(np.concatenate([each["kernel"] for each in found]), one["kernel"])
    np.testing.assert_array_equal(found[1]["bias"], one["bias"])


CALLS_AT_1 = {
    "another value": lambda o: o.override(var_names=["b"], learning_rate=0.3),
    "another kind": lambda o: o.override(var_names=["b"], weight_decay=0.1),
    "a schedule": lambda o: o.override(var_names=["b"], learning_rate=schedules.CosineDecay(0.1, 10)),
    "frozen": lambda o: o.override(var_names=["b"], trainable=False),
    "none": lambda o: None,
    "one more": lambda o: (o.override(var_names=["b"], learning_rate=0.1), o.exclude_from_weight_decay(var_names=["b"])),
    "for another variable": lambda o: o.override(var_names=["w"], learning_rate=0.1),
}  # fmt: skip


@pytest.mark.parametrize("case", CALLS_AT_1)
def test_overrides_that_differ(case):
    def work(ranks):
        optimizer = AdamW()
        if ranks.rank == 1:
            CALLS_AT_1[case](optimizer)
        else:
            optimizer.override(var_names=["b"], learning_rate=0.1)
        with pytest.raises(RankError, match="the calls of `override` and `exclude_from_weight_decay`") as error:
            optimizer.build({"b": np.ones(2), "w": np.ones(2)}, comm=ranks)
        assert not optimizer.built
        return str(error.value)

    first, *others = together(3, work)
    assert others == [first] * 2
    assert "on rank 1; expected the same" in first


def test_a_rank_whose_variables_are_all_frozen():
    def work(ranks):
        optimizer = AdamW(0.1)
        optimizer.override(var_names=["frozen"], trainable=False)
        optimizer.build({"frozen": np.ones(2)} if ranks.rank else {"w": np.ones(2)}, comm=ranks)
        if ranks.rank:
            optimizer.group_of("frozen").trainable = True
            optimizer.group_of("frozen").trainable = False
        optimizer.apply([None] if ranks.rank else [np.ones(2)])
        assert optimizer.iterations == 1
        copy.deepcopy(optimizer)

    on_ranks(2, work)


REPLICATED = {
    "a pattern for nobody": (["^W$"], 0, "matches no variable of any rank"),
    "other values": (["^w$"], 1, "['w'] have other values on rank 1"),
}


@pytest.mark.parametrize("case", REPLICATED)
def test_what_is_replicated(case):
    patterns, difference, text = REPLICATED[case]

    def work(ranks):
        with pytest.raises((ValueError, RankError), match=re.escape(text)):
            AdamW().build({"w": np.full(2, float(difference * ranks.rank))}, comm=ranks, replicated=patterns)

    on_ranks(2, work)


@pytest.mark.parametrize("option", [{"replicated": ["w"]}, {"pieces": {"w": slice(0, 2)}}], ids=str)
def test_what_needs_ranks(option):
    with pytest.raises(ValueError, match="expected `comm` with them"):
        AdamW().build({"w": np.ones(2)}, **option)


def test_a_copy_saves_nothing(tmp_path):
    def work(ranks):
        optimizer = AdamW()
        optimizer.build({"w": np.ones(2)}, comm=ranks)
        with pytest.raises(RuntimeError, match="is the copy of one that was connected"):
            copy.deepcopy(optimizer).save(tmp_path / "state")

    on_ranks(2, work)

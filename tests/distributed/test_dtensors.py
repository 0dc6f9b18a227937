"""DTensors, as FSDP2 makes them: steps and checkpoints of several ranks are those of one process."""

import copy
import itertools
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from helpers import dtensor_runs as runs  # noqa: E402
from torch import distributed  # noqa: E402
from torch.distributed.checkpoint.state_dict import (  # noqa: E402
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh  # noqa: E402
from torch.distributed.fsdp import fully_shard  # noqa: E402
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor  # noqa: E402

import adamw_numba  # noqa: E402
from adamw_numba import LossScaleOptimizer, interop  # noqa: E402
from adamw_numba.torch import AdamW as Front  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")  # as DCP is told
SECONDS = 200  # a hang is a failure
ENVIRONMENT = os.environ | {
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[2]), str(Path(__file__).parents[1])]),
}


def launch(size, checkpoints, what, folder):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(size)]
    command += [Path(runs.__file__), folder, checkpoints, what]
    done = subprocess.run(
        command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=SECONDS
    )
    assert done.returncode == 0, done.stdout[-5000:]
    return [torch.load(folder / str(rank)) for rank in range(size)]


@pytest.fixture(scope="module")
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    return tmp_path_factory.mktemp("checkpoints")


@pytest.fixture(scope="module")
def of_two(checkpoints, tmp_path_factory):
    return launch(2, checkpoints, "save", tmp_path_factory.mktemp("two"))


@pytest.fixture(scope="module")
def of_four(of_two, checkpoints, tmp_path_factory):
    """After those two, whose checkpoints it loads."""
    return launch(4, checkpoints, "load", tmp_path_factory.mktemp("four"))


@pytest.fixture(scope="module")
def of_one(one_thread):
    return {"ways": runs.all_ways(lambda module: None)}


def assert_close(found, expected, tolerance=0.0):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        np.testing.assert_allclose(found[name].float(), tensor.float(), tolerance, tolerance, err_msg=name)


CASES = [(way, options, "float32") for way in runs.WAYS for options in runs.OPTIONS]
CASES += [(way, options, "bfloat16") for way in runs.WAYS for options in ("plain", "global clip")]


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=" ".join)
@pytest.mark.parametrize("size", ["of_two", "of_four", "hybrid"])
def test_the_bits_of_one_process(size, case, of_two, of_four, of_one):
    """Uneven and empty parts among them; and of HSDP, where replicas count once."""
    found = {"of_two": of_two, "of_four": of_four, "hybrid": of_four}[size]
    parameters, norms, skipped = of_one["ways"][case]
    assert skipped == (case[1] in ("skip", "all"))
    for each in found:
        own = each["hybrid" if size == "hybrid" else "ways"][case]
        assert_close(own[0], parameters)
        np.testing.assert_allclose(np.array(own[1], float), np.array(norms, float), 1e-13)
        assert own[2] == skipped


@pytest.mark.slow
@pytest.mark.parametrize("way", runs.WAYS)
def test_a_transformer_goes_on_with_other_ranks(way, of_two, of_four, one_thread, checkpoints):
    """Each rank takes a part of the batch; saved on 2 ranks by DCP, resumed on 4 and in one process."""
    model, optimizer = runs.transformer(lambda module: None, way)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    runs.steps(model, optimizer, 0)
    runs.steps(model, optimizer, runs.HALF)
    expected = {name: p.detach() for name, p in model.named_parameters()}
    assert all((before[name] - p).abs().max() > 0.01 for name, p in expected.items())
    for each in of_two:
        assert_close(each["begun"][way], expected, 2e-6)
    for each in of_four:
        assert_close(each["resumed"][way], expected, 2e-6)
        assert_close(each["resumed hybrid"][way], expected, 2e-6)
    assert_close(runs.resume(lambda module: None, way, checkpoints), expected, 2e-6)


@pytest.mark.slow
@pytest.mark.parametrize("way", runs.WAYS)
def test_masters_averages_and_half_a_window_are_in_the_checkpoint(way, of_two, of_four, one_thread, checkpoints):
    expected = runs.all_of_it(lambda module: None, way)
    for each in (*of_two, *of_four):
        assert_close(each["16 bits"][way], expected)
    assert_close(runs.all_of_it(lambda module: None, way, checkpoints), expected)


@pytest.mark.slow
def test_a_folder_of_files(of_two, of_four, one_thread, checkpoints):
    """Saved on 2 ranks, restored on 4, on 2 x 2, and in one process."""
    expected = runs.by_folder(lambda module: None)
    for found, key in ((of_two, "folder"), (of_four, "folder"), (of_four, "hybrid folder")):
        for each in found:
            assert_close(each[key], expected)
    assert_close(runs.by_folder(lambda module: None, checkpoints), expected)


@pytest.mark.parametrize("shape", [(7, 5), (1, 3), (0, 4), (8,), ()])
@pytest.mark.parametrize("mesh", [(1,), (3,), (4,), (2, 3)])
def test_where_local_tensors_lie(shape, mesh):
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor._utils import _compute_local_shape_and_global_offset as of_torch

    from adamw_numba.ranks import mesh as own

    kinds = [Replicate(), *(Shard(k) for k in range(len(shape)))]
    for placements in itertools.product(kinds, repeat=len(mesh)):
        for coordinate in itertools.product(*map(range, mesh)):
            ranks = SimpleNamespace(shape=mesh, coordinate=coordinate)
            variable = SimpleNamespace(shape=shape, placements=placements)
            piece = own.piece_of(ranks, variable)
            local, start = of_torch(shape, mesh, list(coordinate), placements)
            assert (piece.shape, piece.own) == (shape, tuple(local))
            assert 0 in local or piece.start == tuple(start)


@pytest.mark.slow
def test_state_goes_to_torch_and_comes_back(of_two):
    for each in of_two:
        assert_close(*each["torch"], 1e-6)


@pytest.mark.slow
def test_a_grad_scaler_skips_on_all_ranks(of_two):
    for each in of_two:
        assert each["scaled"] == [(2.0, 2.0)] * 2  # steps, and the scale


@pytest.mark.slow
def test_what_to_local_gives_is_the_parameter(of_two, of_one):
    model = runs.Parts(torch.float32)
    optimizer = adamw_numba.AdamW(0.1, weight_decay=0.1, clipnorm=0.5)
    optimizer.build(model.named_parameters())
    for step in range(runs.STEPS):
        runs.train(model, lambda _: optimizer.apply([p.grad for p in model.parameters()]), step)
    for each in of_two:
        assert_close(each["local"], {name: runs.whole(p) for name, p in model.named_parameters()})


@pytest.mark.slow
def test_cut_copied_and_plain_tensors_in_one_optimizer(of_four, one_thread):
    expected, norm = runs.mixed()
    for found, of_all in (each["mixed"] for each in of_four):
        assert of_all == pytest.approx(norm, rel=1e-13)
        for one, other in zip(found, expected, strict=True):
            np.testing.assert_array_equal(one, other)


@pytest.mark.slow
@pytest.mark.parametrize("way", runs.WAYS)
def test_an_error_reaches_all(way, of_two):
    own = r"ValueError: the gradient of '\w+' is a DTensor of shape \(7, 5\) and placements \(Replicate\(\),\)"
    for each, start in zip(of_two, ("RankError: rank 1: ", ""), strict=True):
        assert_matches(each["errors"]["wrong", way], f"{start}{own}.*expected a DTensor of .*Shard")
        assert_matches(
            each["errors"]["rate", way], "RankError: the learning rates differ: 0.1 on rank 0, 0.2 on rank 1"
        )
        for case in ("missing", "nothing"):
            assert_matches(
                each["errors"][case, way],
                "RankError: the variables, or which of them have gradients, differ: number 0 is .* on rank 0",
            )
        if way == "front":
            assert_matches(each["errors"]["closure", way], f"{start}ArithmeticError: in the closure")
            assert each["errors"]["idle", way] == "nothing"  # as with torch's own
        else:
            assert_matches(
                each["errors"]["idle", way], "ValueError: No gradients provided for any variable on any rank"
            )


@pytest.mark.slow
def test_replicas_whose_gradients_differ(of_four):
    for each in of_four:
        assert_matches(each["replicas"], "RankError: the gradients of parts that ranks have alike differ")
        assert "4.0 on rank 1, 12.0 on rank 3" in each["replicas"]


def assert_matches(text, pattern):
    with pytest.raises(RuntimeError, match=pattern):
        raise RuntimeError(text)


# One rank


@pytest.fixture(scope="module")
def mesh(tmp_path_factory):
    store = tmp_path_factory.mktemp("store") / "meeting"
    distributed.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    distributed.destroy_process_group()


def made(mesh, *shape):
    return torch.nn.Parameter(distribute_tensor(torch.ones(shape), mesh, [Shard(0)]))


def with_placement(mesh, placement, tensor=None):
    return DTensor.from_local(torch.ones(4, 2) if tensor is None else tensor, mesh, [placement], run_check=False)


def strided(mesh):
    from torch.distributed.tensor.placement_types import _StridedShard

    return with_placement(mesh, _StridedShard(0, split_factor=2))


REFUSED = {
    "partial": (
        lambda mesh: [with_placement(mesh, Partial())],
        r"variable '0' is a DTensor of placement Partial\(sum\); expected Shard and Replicate alone: pass `redistribute",
    ),
    "strided": (lambda mesh: [strided(mesh)], "variable '0' is a DTensor of placement _StridedShard"),
    "two meshes": (
        lambda mesh: [
            made(mesh, 2),
            torch.nn.Parameter(
                distribute_tensor(torch.ones(3), init_device_mesh("cpu", (1, 1)), [Shard(0), Replicate()])
            ),
        ],
        r"variable '1' is a DTensor of shape \(3,\) .* expected DTensors of one mesh",
    ),
    "not a leaf": (lambda mesh: [2 * made(mesh, 2)], "variable '0' is not a leaf"),
    "an integer": (lambda mesh: [distribute_tensor(torch.ones(3).int(), mesh, [Shard(0)])], "variable '0' has dtype int32"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("front", [False, True])
def test_variables_that_are_refused(name, front, mesh):
    variables, text = REFUSED[name]
    with pytest.raises((ValueError, TypeError), match=text if not front or name != "not a leaf" else "non-leaf"):
        if front:
            params = variables(mesh)
            optimizer = Front(params)
            for each in params:
                each.grad = torch.zeros_like(each) if each.dtype.is_floating_point else each.clone()
            optimizer.step()
        else:
            adamw_numba.AdamW().build(variables(mesh))


def test_codes_of_a_dtensor_are_refused(mesh):
    """By the front: a state dict of DTensors has no place for the scales. 16 bits are numbers."""
    param = made(mesh, 16, 32)
    for moments in ("8bit", "bfloat16"):
        optimizer = Front([("w", param)], moments=moments)
        param.grad = torch.ones_like(param)
        if moments == "8bit":
            with pytest.raises(ValueError, match=r"moments='8bit': parameter 'w' is a DTensor.*moments='bfloat16'"):
                optimizer.step()
            assert torch.equal(param.full_tensor(), torch.ones(16, 32))
        else:
            optimizer.step()
            moment = optimizer.state[param]["exp_avg"]
            assert (type(moment), moment.dtype) == (DTensor, torch.bfloat16)


def test_comm_is_not_given_as_well(mesh):
    with pytest.raises(ValueError, match="`comm` is given, and there are DTensors, whose mesh connects the ranks"):
        adamw_numba.AdamW().build([made(mesh, 2)], comm=mesh)


def test_gradients_that_are_refused(mesh):
    variable, plain = made(mesh, 4, 2), torch.ones(3)
    optimizer = adamw_numba.AdamW()
    optimizer.build({"w": variable, "plain": plain})
    for gradient in (with_placement(mesh, Replicate()), with_placement(mesh, Partial()), made(mesh, 4, 3)):
        with pytest.raises(ValueError, match=r"the gradient of 'w' is a DTensor of .*; expected a DTensor of shape"):
            optimizer.apply({"w": gradient, "plain": torch.ones(3)})
    with pytest.raises(ValueError, match=r"the gradient of 'w' has shape \(4, 3\); expected \(4, 2\)"):
        optimizer.apply({"w": torch.ones(4, 3), "plain": torch.ones(3)})
    with pytest.raises(TypeError, match="the gradient of 'plain' is a DTensor"):
        optimizer.apply({"w": torch.ones_like(variable), "plain": made(mesh, 3)})
    assert optimizer.iterations == 0
    optimizer.apply({"w": torch.ones(4, 2), "plain": torch.ones(3)})  # the local gradient is one
    assert optimizer.iterations == 1


def test_autograd_is_told(mesh):
    """Both of a DTensor that is used itself, and of the local tensor that was taken of it."""
    variable = made(mesh, 4, 2)
    optimizer = adamw_numba.AdamW()
    optimizer.build([variable])
    of_itself, of_local = variable.square().sum(), variable.to_local().square().sum()
    optimizer.apply([torch.ones_like(variable)])
    for loss in (of_itself, of_local):
        with pytest.raises(RuntimeError, match=r"modified (by an )?in-?place"):
            loss.backward()


def test_what_to_local_gives(mesh):
    """Alone, without the other ranks: it is a plain tensor, that shares its memory with the parameter."""
    variable = made(mesh, 4, 2)
    optimizer = adamw_numba.AdamW(0.1, use_ema=True)
    optimizer.build([variable.to_local()])
    optimizer.apply([torch.ones(4, 2)])
    assert optimizer.engine.together is None
    np.testing.assert_allclose(runs.whole(variable), 0.9, rtol=1e-3)
    with optimizer.averaged():
        np.testing.assert_array_equal(runs.whole(variable), optimizer.averages[0])
    with pytest.raises(ValueError, match="variable '0' is not a leaf"):
        adamw_numba.AdamW().build([2 * variable.to_local()])


def test_built_by_the_first_step(mesh):
    """Which is already taken together: its norm is asked for."""
    variable = made(mesh, 4, 2)
    optimizer = adamw_numba.AdamW(0.1, global_clipnorm=1.0)
    optimizer.apply([torch.ones_like(variable)], [variable])
    assert optimizer.last_step.gradient_norm == pytest.approx(8**0.5)
    assert optimizer.engine.together.ranks.mesh == mesh
    optimizer.apply([torch.ones_like(variable)])
    assert optimizer.iterations == 2


def test_a_local_tensor_that_was_replaced(mesh):
    """As `model.to` does with those of FSDP2."""
    variable, other = made(mesh, 4, 2), torch.nn.Parameter(torch.ones(4, 2))
    ours, theirs = adamw_numba.AdamW(0.1), adamw_numba.AdamW(0.1)
    ours.build([variable]), theirs.build([other])
    gradient = torch.linspace(-1, 1, 8).reshape(4, 2)
    for _ in range(3):
        ours.apply([distribute_tensor(gradient, mesh, [Shard(0)])])
        theirs.apply([gradient])
        variable._local_tensor = variable._local_tensor.clone()
    np.testing.assert_array_equal(runs.whole(variable), other.detach())
    variable._local_tensor = variable._local_tensor.double()
    with pytest.raises(ValueError, match=r"variable '0' has become an array of shape \(4, 2\) and dtype torch.float64"):
        ours.apply([distribute_tensor(gradient, mesh, [Shard(0)])])


def test_the_front_goes_on_with_a_local_tensor_that_was_replaced(mesh):
    variable, other = made(mesh, 4, 2), torch.nn.Parameter(torch.ones(4, 2))
    ours, theirs = Front([variable], lr=0.1), torch.optim.AdamW([other], lr=0.1)
    step = None
    for k in range(3):
        other.grad = torch.linspace(-1, 1, 8).reshape(4, 2) * (k + 1)
        variable.grad = distribute_tensor(other.grad, mesh, [Shard(0)])
        ours.step(), theirs.step()
        variable._local_tensor = variable._local_tensor.clone()
        step = ours.state[variable]["step"] if step is None else step
        assert step == k + 1
        np.testing.assert_allclose(runs.local(ours.state[variable]["exp_avg"]), theirs.state[other]["exp_avg"], 1e-6)
    np.testing.assert_allclose(runs.whole(variable), other.detach(), 1e-6)


@pytest.mark.parametrize("options", [{}, {"full_state_dict": True}, {"flatten_optimizer_state_dict": True}])
def test_torch_s_functions(options, mesh):
    """In their ways of giving a state, between ours, and between ours and torch's."""
    options, state = StateDictOptions(**options), None
    torch.manual_seed(0)
    models = [torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Linear(2, 2)) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    fully_shard(models[0], mesh=mesh)
    whole = torch.optim.AdamW(models[1].parameters(), lr=0.1)
    for kind in (Front, torch.optim.AdamW, Front):  # each of which goes on from the one before
        optimizer = kind(models[0].parameters(), lr=0.1)
        if state is not None:
            models[0].zero_grad()  # torch makes no state to load into where there are gradients
            set_optimizer_state_dict(models[0], optimizer, state, options=options)
        for step in range(3):
            for model, each in zip(models, (optimizer, whole), strict=True):
                model.zero_grad()
                model(torch.full((2, 3), 1.0 + step)).square().sum().backward()
                each.step()
        state = get_optimizer_state_dict(models[0], optimizer, options=options)
    for one, other in zip(models[0].parameters(), models[1].parameters(), strict=True):
        np.testing.assert_allclose(runs.whole(one), other.detach(), 1e-5, 1e-6)


@pytest.mark.parametrize("kind", [adamw_numba.AdamW, Front])
def test_model_to_keeps_the_optimizer_going(kind, mesh):
    model, other = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
    other.load_state_dict(model.state_dict())
    fully_shard(model, mesh=mesh)
    optimizers = []
    for each in (model, other):
        optimizer = kind(learning_rate=0.1) if kind is adamw_numba.AdamW else kind(each.parameters(), lr=0.1)
        optimizer.build(each.named_parameters()) if kind is adamw_numba.AdamW else None
        optimizers.append(optimizer)
    for _ in range(2):
        for each, optimizer in zip((model, other), optimizers, strict=True):
            each.zero_grad()
            each(torch.ones(1, 3)).sum().backward()
            optimizer.apply([p.grad for p in each.parameters()]) if kind is adamw_numba.AdamW else optimizer.step()
        model.to("cpu", torch.float32)
        model.load_state_dict({name: value.clone() for name, value in model.state_dict().items()})
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        np.testing.assert_array_equal(runs.whole(one), two.detach())


def test_groups_averages_and_a_loss_scale(mesh):
    variables = {"kernel": made(mesh, 4, 2), "bias": made(mesh, 3)}
    inner = adamw_numba.AdamW(0.1, use_ema=True, nonfinite="skip")
    inner.exclude_from_weight_decay(var_list=[variables["bias"]])
    optimizer = LossScaleOptimizer(inner, initial_scale=4.0)
    optimizer.build(variables)
    gradients = {name: torch.full_like(v, 8.0) for name, v in variables.items()}
    optimizer.apply(gradients)
    assert [group.names for group in inner.groups] == [("kernel",), ("bias",)]
    assert inner.groups[1].variables[0] is variables["bias"]
    now = runs.whole(variables["bias"])
    with inner.averaged():
        np.testing.assert_array_equal(runs.whole(variables["bias"]), inner.averages[1])
    np.testing.assert_array_equal(runs.whole(variables["bias"]), now)
    runs.local(gradients["bias"])[0] = torch.inf
    optimizer.apply(gradients)
    assert optimizer.dynamic_scale == 2.0
    assert inner.iterations == 1


def test_a_copy_cannot_go_on(mesh):
    optimizer = adamw_numba.AdamW()
    optimizer.build([made(mesh, 2)])
    with pytest.raises(RuntimeError, match="the copy of one that was connected"):
        copy.deepcopy(optimizer).apply([torch.ones(2)])


def test_parts_are_not_exported_as_if_they_were_all(mesh):
    optimizer = adamw_numba.AdamW(epsilon_mode="corrected")
    optimizer.build([made(mesh, 2)])
    with pytest.raises(ValueError, match="the variables are DTensors, of which each process has a part"):
        interop.to_torch(optimizer)


def test_what_the_front_shows_counts(mesh):
    """Also what is put there; a tensor that is no DTensor is refused."""
    model = torch.nn.Linear(3, 2)
    fully_shard(model, mesh=mesh)
    optimizer = Front(model.parameters(), lr=0.1)
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    own, shown = optimizer.state[model.weight], optimizer.state[model.weight]["exp_avg"]
    before = runs.local(shown).clone()
    optimizer.step()
    assert own["exp_avg"] is shown
    assert not torch.equal(runs.local(shown), before)
    runs.local(shown).zero_()
    own["exp_avg_sq"] = torch.full_like(model.weight, 7.0).detach()
    own["step"] = torch.tensor(5.0)
    optimizer.step()
    np.testing.assert_allclose(runs.local(own["exp_avg"]), 0.1, rtol=1e-6)
    np.testing.assert_allclose(runs.local(own["exp_avg_sq"]), 7 * 0.999 + 0.001, rtol=1e-6)
    assert own["step"] == 6
    assert own["exp_avg"] is shown
    before = runs.whole(model.weight)
    own["exp_avg"] = torch.zeros(2, 3)
    with pytest.raises(ValueError, match=r"'exp_avg': it is a Tensor; expected a DTensor.*set_optimizer_state_dict"):
        optimizer.step()
    own["exp_avg"] = with_placement(mesh, Replicate(), torch.zeros(2, 3))
    with pytest.raises(ValueError, match=r"'exp_avg': it is a DTensor of shape \(2, 3\) and placements \(Replicate"):
        optimizer.step()
    np.testing.assert_array_equal(runs.whole(model.weight), before)


# Checkpoints in one process


def test_dcp_state_of_plain_variables(tmp_path):
    from torch.distributed import checkpoint

    def make(value):
        variables = {"a/b": torch.full((3,), value), "n": np.full((2, 2), value, np.float32)}
        optimizer = adamw_numba.AdamW(0.1, amsgrad=True)
        optimizer.add_variable((2,), name="mine")
        optimizer.build(variables)
        return variables, optimizer

    (_, one), (_, other) = make(1.0), make(2.0)
    for _ in range(3):
        one.apply([torch.ones(3), np.ones((2, 2), np.float32)])
    one.learning_rate = 0.3
    one.state["mine"][...] = 5.0
    checkpoint.save({"o": interop.dcp_state(one)}, checkpoint_id=tmp_path / "c", no_dist=True)
    checkpoint.load({"o": interop.dcp_state(other)}, checkpoint_id=tmp_path / "c", no_dist=True)
    assert other.iterations == 3
    assert other.learning_rate == 0.3
    for name, array in one.state.items():
        np.testing.assert_array_equal(other.state[name], array, err_msg=name)


KINDS = {
    "float32": {},
    "bfloat16": {"moments": "bfloat16"},
    "8 bits": {"moments": "8bit"},
    "masters": {"dtype": torch.bfloat16},
    "remainders": {"dtype": torch.bfloat16, "master_weights": "remainder"},
}


@pytest.mark.parametrize(
    ("first", "then"),
    [("8 bits", "float32"), ("bfloat16", "float32"), ("float32", "8 bits"), ("masters", "remainders")],
)
@pytest.mark.parametrize("is_numpy", [True, False])
def test_dcp_takes_no_codes_for_numbers(first, then, is_numpy, tmp_path):
    """It would cast them to the dtype that it is to load into."""
    from torch.distributed import checkpoint

    def make(dtype=torch.float32, **options):
        values = torch.ones(512, dtype=dtype)
        optimizer = adamw_numba.AdamW(0.1, **options)
        optimizer.build({"w": values.numpy() if is_numpy and dtype == torch.float32 else values})
        return optimizer

    if first == "bfloat16" and not is_numpy:
        pytest.skip("torch's bfloat16 are numbers, which may be cast")
    one, other = make(**KINDS[first]), make(**KINDS[then])
    checkpoint.save({"o": interop.dcp_state(one)}, checkpoint_id=tmp_path / "c", no_dist=True)
    with pytest.raises(
        checkpoint.api.CheckpointException, match=r"Missing key in checkpoint state_dict: o\.(momentum|velocity|master)"
    ):
        checkpoint.load({"o": interop.dcp_state(other)}, checkpoint_id=tmp_path / "c", no_dist=True)


def test_a_dcp_state_that_does_not_fit(mesh):
    def made_of(**options):
        optimizer = adamw_numba.AdamW(**options)
        optimizer.build({"w": made(mesh, 4, 2)})
        return interop.dcp_state(optimizer), optimizer

    (state, one), (other, two) = made_of(), made_of(amsgrad=True)
    one.apply([torch.ones(4, 2)])
    with pytest.raises(ValueError, match="lacks the velocity_hat of 'w', which `amsgrad` asks for"):
        other.load_state_dict(state.state_dict())
    wrong = state.state_dict() | {"momentum/w": with_placement(mesh, Replicate())}
    with pytest.raises(ValueError, match=r"'momentum/w' is a DTensor of shape \(4, 2\) and placements \(Replicate"):
        made_of()[0].load_state_dict(wrong)
    with pytest.raises(ValueError, match="expected what `state_dict\\(\\)` returns"):
        other.load_state_dict({})
    with pytest.raises(TypeError, match="`optimizer` is 3; expected an AdamW"):
        interop.dcp_state(3)
    with pytest.raises(ValueError, match="`dcp_state` needs an optimizer that is built"):
        interop.dcp_state(adamw_numba.AdamW())
    assert two.iterations == 0
    target = made_of()
    target[0].load_state_dict(state.state_dict())
    assert target[1].iterations == 1
    np.testing.assert_array_equal(target[1].state["momentum/w"], one.state["momentum/w"])

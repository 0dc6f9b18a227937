"""ZeRO's first stage: every rank has all variables, and the state of its own share of them."""

import json
import zlib
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NoReturn

import numpy as np

from .. import arrays
from ..arrays import Array
from ..arrays.brief import brief
from ..arrays.tree import Container
from ..hyperparameters.table import choice, integer
from ..ranks.agreement import Agreement
from ..ranks.engines import ranks_of
from ..ranks.protocol import BulkRanks, RankError
from ..step import gradients as matching
from .shares import Shares

BUCKET_BYTES = 4 << 20
SAME = 1e-3  # of a sum, up to which what was reduced in another order may differ


class Sharded:
    """An optimizer of variables that all ranks have, each of which keeps the state of its share: ZeRO, stage 1.

    A step adds the gradients of all ranks, updates on each rank its share of the elements, and gives the new elements
    to all ranks (Rajbhandari et al. 2020, section 5.1). A rank sends what it would send to average gradients, and its
    state is that of all variables divided by the number of ranks.

    Parameters
    ----------
    optimizer : AdamW or LossScaleOptimizer
        Not built yet. Its hyperparameters may be changed at any time, on all ranks alike; its state is that of this
        rank's share.
    comm : communicator of mpi4py, process group or device mesh of torch, or BulkRanks
    gradients : {"mean", "sum", "reduced"}
        What counts: the mean or the sum of the ranks' gradients, or those of every rank, which are the same on all of
        them already, as after torch's DistributedDataParallel.
    bucket_bytes : int, default 4 MiB
        The most that a rank sends at once of what it has to copy first. It receives as much, and needs no other memory
        than for both and for its share of the gradients.

    Attributes
    ----------
    optimizer : AdamW or LossScaleOptimizer
        As given: ``iterations``, ``last_step``, ``learning_rate``, ``groups`` and the like are to be found there.

    Raises
    ------
    TypeError
        If `optimizer` is no optimizer, or `comm` nothing that exchanges bytes.
    ValueError
        If the optimizer is built, or an argument is out of range.

    Notes
    -----
    The gradients are added in the order of the ranks, in their own dtype (16-bit ones in float32), so that the same
    gradients on as many ranks give the same bits with every engine. What does not depend on the number of ranks is a
    step with ``gradients="reduced"``: on the CPU it gives the bits of one process, with clips too.
    """

    def __init__(self, optimizer: Any, comm: Any, *, gradients: str = "mean", bucket_bytes: int = BUCKET_BYTES) -> None:
        engine = getattr(getattr(optimizer, "inner_optimizer", optimizer), "engine", None)
        if engine is None or not hasattr(optimizer, "apply"):
            raise TypeError(
                f"`optimizer` is {brief(optimizer)} of type {type(optimizer).__name__}; expected an AdamW or a "
                "LossScaleOptimizer"
            )
        if optimizer.built:
            raise ValueError("`optimizer` is built; expected one that is not, to be built on a share of the variables")
        self._gradients = choice("mean", "sum", "reduced")("gradients", gradients)
        self._bucket_bytes = integer(1024, optional=False)("bucket_bytes", bucket_bytes)
        ranks = ranks_of(comm)
        if not isinstance(ranks, BulkRanks):
            raise TypeError(
                f"`comm` is {brief(comm)} of type {type(comm).__name__}, which exchanges no bytes; expected one with "
                "`exchange` and `spread` (see `distributed.BulkRanks`)"
            )
        self.optimizer = optimizer
        self._engine, self._ranks, self._together = engine, ranks, Agreement(ranks)
        self._shares: Shares | None = None

    def __repr__(self) -> str:
        where = f"rank {self._ranks.rank} of {self._ranks.size}"
        return f"Sharded({self.optimizer!r}, {where}, gradients={self._gradients!r})"

    def __getattr__(self, name: str) -> NoReturn:
        value = getattr(vars(self).get("optimizer"), name, None)
        hint = "" if value is None or callable(value) else f": it is `optimizer.{name}`"
        raise AttributeError(f"a `Sharded` has no attribute {brief(name)}{hint}")

    def __setattr__(self, name: str, value: Any) -> None:
        if name != "optimizer" and not name.startswith("_"):
            raise AttributeError(f"a `Sharded` has no attribute {brief(name)} to set; set that of its `optimizer`")
        super().__setattr__(name, value)

    def __reduce__(self) -> NoReturn:
        raise TypeError("a `Sharded` is connected with other processes, and cannot be copied or pickled")

    # Setting up

    def build(self, variables: Container) -> None:
        """Allocate the state of this rank's share of the variables.

        Parameters
        ----------
        variables : container
            As for `AdamW.build`, with the same names, shapes, dtypes and values on all ranks. Each has to lie in memory
            in the order of its axes.

        Raises
        ------
        TypeError, ValueError
            As from `AdamW.build`, or if a variable lies in memory in another way.
        RankError
            If another rank has failed, or has other variables.
        """
        with self._engine.lock:
            with self._together.deciding("build of a Sharded"):
                if self._shares is not None:
                    raise ValueError("this `Sharded` is built already; expected a new one for other variables")
                names, given = matching.variables_of(self._engine, variables)
                if not names:
                    raise ValueError("`variables` is empty; expected at least one array")
                shares = Shares(self._engine, names, given, self._ranks, self._bucket_bytes)
                self._together.agree()
            own = [["gradients", self._gradients], ["bucket_bytes", self._bucket_bytes]]
            self._compare("arguments of `Sharded`", own)
            self._compare("variables", shares.described())
            self._compare(
                "values of the variables", [list(each) for each in zip(names, shares.checksums(), strict=True)], shows=1
            )
            # Arrays that an override lists are not those that the optimizer is going to see.
            hyper = self._engine.hyper
            hyper.overrides = [override.by_names(names, given) for override in hyper.overrides]
            may_hold_variables = self._engine.loaded is not None
            self.optimizer.build(shares.own, comm=self._ranks, pieces=shares.pieces)
            self._engine.warns, self._shares = False, shares
            self._together.mark = self._engine.together.mark
            if may_hold_variables:
                shares.spread(self._ranks, frozen=True)

    def verify(self) -> None:
        """Compare the variables of all ranks, bit for bit.

        Raises
        ------
        RankError
            If one differs.
        """
        with self._engine.lock:
            with self._together.deciding("verify of a Sharded"):
                shares = self._require_built("verify")
                self._together.agree()
            self._compare("values of the variables", shares.checksums(), shows=1)

    def _compare(self, what: str, mine: list[Any], shows: int | None = None) -> None:
        """Refuse what differs between ranks: of the first thing that does, so many words are told."""
        told = self._together.tell(mine)
        for rank, others in enumerate(told):
            if others != told[0]:
                found = zip([*told[0], None], [*others, None], strict=False)
                first, other = next(pair for pair in found if pair[0] != pair[1])
                told_of = (
                    f"{brief(first)} on rank 0, {brief(other)} on rank {rank}"
                    if shows is None
                    else f"{brief((first or other)[:shows])} on ranks 0 and {rank}"
                )
                raise RankError(f"the {what} differ: {told_of}; expected the same on all ranks")

    def _require_built(self, what: str) -> Shares:
        if self._shares is None:
            raise ValueError(f"`{what}` needs a `Sharded` that is built. Call `build(variables)` first.")
        return self._shares

    # Stepping

    def apply(self, grads: Container, trainable_variables: Container | None = None) -> None:
        """Take one step with all ranks: see `AdamW.apply`.

        Up to where the new elements are sent it is all or nothing, on all ranks. An interrupt after that has to end all
        of them: their variables are not the same any more.

        Parameters
        ----------
        grads : container
            Those of this rank. A variable without one (None) that has one on another rank counts as zeros.
        trainable_variables : container, optional
            Builds the optimizer at the first call; later, the variables that the gradients belong to.

        Raises
        ------
        RankError
            If another rank has failed, or they do not agree.
        """
        with self._engine.lock:
            if self._shares is None and trainable_variables is not None:
                self.build(trainable_variables)
            shares = self._require_built("apply")
            found = self._agreed(shares, grads, trainable_variables)
            before = self._engine.updates()
            with self._engine.together.deciding("apply"):  # the step's own decision tells what is raised before it
                if self._is_reduced:
                    own = shares.of_own(found)
                else:
                    own = shares.reduced(self._ranks, found, self._ranks.size if self._gradients == "mean" else 1)
                matching.warn_of(shares.without(found), stacklevel=3)
                self.optimizer.apply(own)
            if self._engine.updates() > before and self._ranks.size > 1:
                shares.spread(self._ranks)

    def apply_gradients(self, grads_and_vars: Iterable[tuple[Array | None, Array]]) -> None:
        """Take one step with ``(gradient, variable)`` pairs: see `AdamW.apply_gradients`."""
        self.apply(*matching.pairs(self._engine, grads_and_vars))

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Inside the block the variables hold their averages, on all ranks: see `AdamW.averaged`."""
        shares = self._require_built("averaged")
        with ExitStack() as stack:
            with self._together.deciding("averaged of a Sharded"):
                stack.enter_context(self.optimizer.averaged())
                self._together.agree()
            try:
                shares.spread(self._ranks)
                yield
            finally:
                stack.close()
                shares.spread(self._ranks)

    # Saving

    def save(self, target: Any, extra: Any = None, variables: bool = False, durable: bool = True) -> None:
        """Save the state of all ranks in a folder: see `AdamW.save`. Any number of ranks, or one process, can load it.

        To go on with what was saved, give ``AdamW.load(target)`` to a new `Sharded`, whose `build` takes the state.
        """
        self._require_built("save")
        self.optimizer.save(target, extra, variables, durable)

    def restore(self, target: Any) -> Any:
        """Take a state that any number of ranks have saved: see `AdamW.restore`."""
        with self._engine.lock:
            shares = self._require_built("restore")
            extra = self.optimizer.restore(target)
            shares.spread(self._ranks, frozen=True)
            return extra

    @property
    def _is_reduced(self) -> bool:
        return self._gradients == "reduced" or self._ranks.size == 1

    def _agreed(self, shares: Shares, grads: Container, variables: Container | None) -> list[Array | None]:
        """The gradients in order, of the same dtypes on all ranks."""
        with self._together.deciding("apply of a Sharded"):
            shares.check(self._engine)
            found = shares.matched(grads, variables)
            kinds = [None if g is None else arrays.dtype_name(g) for g in found]
            shares.prepare(kinds if not self._is_reduced else ())
            own = float(zlib.crc32(json.dumps(kinds).encode()))
            sample = shares.sample(found) if self._gradients == "reduced" else 0.0
            checksums, samples = self._together.told_with(own, sample).T
        if (checksums == own).all():
            finite = samples[np.isfinite(samples)]
            if len(finite) > 0 and (len(finite) < len(samples) or np.ptp(finite) > SAME * finite.max()):
                raise RankError(
                    f"the gradients differ between the ranks: sums of a sample are {brief(samples.tolist())}, in the "
                    "ranks' order; expected the same on all, with gradients='reduced'"
                )
            return found
        told = self._together.tell(kinds)
        for i, (name, each) in enumerate(zip(shares.whole.names, zip(*told, strict=True), strict=True)):
            there = set(each) if self._is_reduced else set(each) - {None}
            if len(there) > 1:
                raise RankError(
                    f"the gradients of {brief(name)} are {brief(list(each))} on the ranks, in order; expected one dtype"
                )
            kinds[i] = next(iter(there), None)
        with self._together.deciding("apply of a Sharded"):
            for i, (kind, variable) in enumerate(zip(kinds, shares.whole.variables, strict=True)):
                if found[i] is None and kind is not None:
                    found[i] = arrays.zeros_like(variable, kind)
            shares.prepare(kinds)
            self._together.agree()
        return found

"""The learning rates and weight decays of an optimizer, at any step."""

from typing import Any

import numpy as np

from ..hyperparameters import table as hp
from ..state import State

Pair = tuple[Any, Any]  # a learning rate and a weight decay


class Rates:
    """What an engine knows of its rates.

    Attributes
    ----------
    hyper : hyperparameters.Hyperparameters
    state : State
        Which holds the learning rate, while it is a number.
    """

    hyper: Any
    state: State

    def catch_up(self) -> None:
        """Ask a GPU that counts by itself for the iteration."""
        raise NotImplementedError

    def rate(self) -> hp.Rate | float:
        """What was set as learning rate; a signal's handler may put a callable in a number's place, and back."""
        scalars = self.state.scalars
        array, rate = scalars.get("learning_rate"), self.hyper.learning_rate_function
        if rate is not None:
            return rate  # type: ignore[no-any-return]
        return float(scalars["learning_rate"] if array is None else array)

    def set_rate(self, value: Any) -> None:
        """Set the learning rate: a number lives in the state, anything callable among the hyperparameters."""
        value = hp.rate("learning_rate", value)
        scalars = self.state.scalars
        if callable(value):
            self.hyper.learning_rate_function = hp.Rate("learning_rate", value)
            scalars.pop("learning_rate", None)
        else:
            scalars.setdefault("learning_rate", np.zeros(()))[...] = value
            self.hyper.learning_rate_function = None

    def rates_at(self, number: Any, learning_rate: Any = None) -> tuple[Any, Any, list[Pair]]:
        """Learning rate and weight decay at a step, and those of every other group.

        A learning rate that is a number may be given, where it is a traced one.
        """
        own, hyper = self.rate(), self.hyper
        if not isinstance(own, float):
            learning_rate = own(number)
        elif learning_rate is None:
            learning_rate = own
        decay = hyper.weight_decay_function
        decay = hyper.weight_decay if decay is None else decay(number)
        return learning_rate, decay, [group.rates_at(number, learning_rate, decay) for group in hyper.others]

    def rates_now(self) -> tuple[Any, Any, list[Pair]]:
        """Learning rates and weight decays at the present iteration."""
        iteration = self.state.scalars["iteration"]
        number = iteration.item()
        rates = self.rates_at(number)
        if iteration.item() != number:
            raise RuntimeError("a callable rate has itself taken a step; expected it to return a number only")
        return rates

    def key(self) -> object:
        """Equal for steps whose coefficients follow from the iteration alone, in the same way; None if they may not."""
        hyper = self.hyper
        rate, decay = hyper.learning_rate_function, hyper.weight_decay_function
        functions = [called for called in (rate, decay) if called is not None]
        keys = [called.key() for called in (*functions, *(own for group in hyper.others for own in group.functions()))]
        if any(key is None for key in keys):
            return None
        counts = [group.started for group in hyper.groups] if hyper.counts_each else None
        return self.state.scalars["learning_rate"].item() if rate is None else None, hyper.token, keys, counts

    def count(self) -> int:
        """Calls of `apply` so far: the step that schedules are asked for."""
        self.catch_up()
        return int(self.state.scalars["iteration"])

    def group_rates(self) -> list[tuple[float, float]]:
        """Learning rate, with its multiplier, and weight decay of every group at the present step."""
        rate, decay, others = self.rates_at(self.count())
        return [(rate, decay), *others]

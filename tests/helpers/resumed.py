"""What test_minimize_resume.py runs in a process of its own: ``resumed.py CASE CHECKPOINT STOP_AT OUTPUT``.

At iteration STOP_AT the process sends itself SIGTERM; -1 is never. The result goes into OUTPUT; where nothing stopped it,
that of a run without a checkpoint as well.
"""

import os
import signal
import sys

import numba
import numpy as np

from adamw_numba import Checkpoints, minimize, schedules


class Shuffled:
    """Another order at every walk: the order depends on how often it has been walked."""

    def __init__(self):
        self.generator = np.random.default_rng(0)
        self.data = self.generator.normal(size=(7, 3))

    def __iter__(self):
        return iter(self.generator.permutation(self.data))


@numba.njit
def valley(x):
    a, b = x[1] - x[0] * x[0], 1 - x[0]
    return 100 * a * a + b * b, np.array([-400 * a * x[0] - 2 * b, 200 * a])


def noisy(x, batch):
    return ((x - batch) ** 2).sum(), 2 * (x - batch)


def jax_start():
    import jax.numpy as jnp

    return jnp.zeros(3)


def torch_start():
    import torch

    return {"a": torch.zeros(3), "b": [torch.ones(2, 2, dtype=torch.bfloat16)]}


def nested(x):
    value = ((x["a"] - 1) ** 2).sum() + (x["b"][0].float() ** 2).sum()
    return value, {"a": 2 * (x["a"] - 1), "b": [2 * x["b"][0].float()]}


COSINE = schedules.CosineDecay(0.1, 120)
CASES = {
    "batches": lambda: {
        "fun": noisy,
        "x0": np.zeros(3),
        "batches": Shuffled(),
        "learning_rate": COSINE,
        "use_ema": True,
    },
    "compiled": lambda: {"fun": valley, "x0": np.array([-1.2, 1.0]), "patience": 100, "history": 16},
    "torch": lambda: {"fun": nested, "x0": torch_start(), "global_clipnorm": 1.0, "learning_rate": 0.001},
    "jax": lambda: {"fun": lambda x: (((x - 1) ** 2).sum(), 2 * (x - 1)), "x0": jax_start(), "weight_decay": 0.1},
    "numbered": lambda: {"fun": valley, "x0": np.array([-1.2, 1.0]), "learning_rate": COSINE, "return_best": False},
}


def plain(array):
    """As an array of NumPy, which has no bfloat16."""
    return np.asarray(array.float() if hasattr(array, "float") else array)


def flat(result):
    """All numbers of a result but the times."""
    arrays = {key: result[key] for key in ("fun", "fun_last", "nit", "nfev", "njev", "status") if key in result}
    trees = {key: result[key] for key in ("x", "x_last", "jac", "x_average") if key in result}
    for name, tree in trees.items():
        leaves = [tree["a"], tree["b"][0]] if isinstance(tree, dict) else [tree]
        arrays |= {f"{name}{k}": plain(leaf) for k, leaf in enumerate(leaves)}
    arrays |= {f"state {key}": plain(value) for key, value in result["state"].items()}
    return arrays | {f"history {key}": value for key, value in result["history"].items() if key != "time"}


def main(case, checkpoint, stop_at, output):
    def stop(intermediate_result):
        if intermediate_result.nit == int(stop_at):
            os.kill(os.getpid(), signal.SIGTERM)

    keywords = {"jac": True, "maxiter": 120, "gtol": None, "callback": stop}
    place = Checkpoints(checkpoint, every=13) if case == "numbered" else checkpoint
    result = minimize(**keywords | CASES[case](), checkpoint=place)
    np.savez(output, **flat(result))
    if stop_at == "-1":
        np.savez(f"{output}.whole.npz", **flat(minimize(**keywords | CASES[case]())))


if __name__ == "__main__":
    main(*sys.argv[1:])

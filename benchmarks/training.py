"""Whether training is as good with moments of 16 and 8 bits: final losses over five seeds, beside those of float32.

    python -m benchmarks.training [--seeds 5]

Four problems, in float32: handwritten digits (a perceptron), CO2 at Mauna Loa (13 unknowns; fewer than a block, so that
8 bits do not apply), the diffusivity of a plate (10,000 unknowns), and the next letter in the project's own docs. A row
gives the mean of the final losses, and their standard deviation over the seeds.
"""

import argparse
import importlib
import statistics
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from adamw_numba import AdamW
from adamw_numba.arrays.moments import MOMENTS
from adamw_numba.schedules import CosineDecay

HOME = Path(__file__).parents[1]
CONTEXT, WIDTH, HIDDEN, BATCH, STEPS = 8, 32, 256, 128, 3000  # of the letters


def example(name: str) -> Any:
    """One of the example scripts, as a module."""
    if str(HOME / "examples") not in sys.path:
        sys.path.append(str(HOME / "examples"))
    return importlib.import_module(name)


def digits(seed: int, moments: str) -> float:
    """The mean loss of the last epoch's batches."""
    script, generator = example("digits"), np.random.default_rng(seed)
    training, _ = script.load_digits()
    parameters = script.new_parameters(generator)
    optimizer = AdamW(
        script.SCHEDULE, weight_decay=script.WEIGHT_DECAY, global_clipnorm=1.0, moments=moments, seed=seed
    )
    optimizer.exclude_from_weight_decay(var_names=["bias"])
    optimizer.build(parameters)
    losses: list[float] = []
    for _ in range(script.EPOCHS):
        losses = []
        for batch in script.batches(training, generator):
            loss, gradients = script.loss_and_gradients(parameters, batch)
            optimizer.apply(gradients)
            losses.append(loss)
    return statistics.mean(losses)


def carbon_dioxide(seed: int, moments: str) -> float:
    """The root mean square of the residuals, in ppm, from another start for each seed."""
    script = example("co2")
    record = script.load_record()
    features = script.features(record.year)
    x = np.random.default_rng(seed).standard_normal(script.UNKNOWNS).astype(np.float32)
    x[0] += record.ppm.mean()
    optimizer = AdamW(CosineDecay(0.5, script.ITERATIONS), weight_decay=0, moments=moments, seed=seed)
    optimizer.build([x])
    for _ in range(script.ITERATIONS):
        _, gradient = script.loss(x.astype(np.float64), features, record.ppm)
        optimizer.apply([gradient.astype(np.float32)])
    return float(np.sqrt(script.loss(x.astype(np.float64), features, record.ppm)[0]))


def plate(seed: int, moments: str) -> float:
    """The objective after as many steps as the example takes, over the one at the truth; other noise for each seed."""
    script = example("inverse_problem")
    data = script.experiment(seed)
    k = np.ones(data.truth.shape, np.float32)
    optimizer = AdamW(CosineDecay(0.1, script.ITERATIONS), weight_decay=0, moments=moments, seed=seed)
    optimizer.build([k])
    for _ in range(script.ITERATIONS):
        _, gradient = script.objective(k.astype(np.float64), data.start, data.pictures)
        optimizer.apply([gradient.astype(np.float32)])
        np.clip(k, script.LOWEST, script.HIGHEST, out=k)
    found, truth = (script.objective(each.astype(np.float64), data.start, data.pictures)[0] for each in (k, data.truth))
    return float(found / truth)


def letters(seed: int, moments: str) -> float:
    """The cross-entropy of the next letter, in nats, over the part of the docs that is held out."""
    text = "".join(path.read_text() for path in sorted((HOME / "docs").glob("*.md")))
    letters, codes = np.unique(np.array(list(text)), return_inverse=True)
    windows = np.lib.stride_tricks.sliding_window_view(codes, CONTEXT + 1)
    training, test = windows[: -len(windows) // 10], windows[-len(windows) // 10 :: 7]
    generator = np.random.default_rng(seed)

    def normal(*shape: int) -> Any:
        return (generator.standard_normal(shape) / np.sqrt(shape[0])).astype(np.float32)

    weights = {
        "embedding": normal(len(letters), WIDTH),
        "hidden": normal(CONTEXT * WIDTH, HIDDEN),
        "output": normal(HIDDEN, len(letters)),
        "bias": np.zeros(len(letters), np.float32),
    }
    optimizer = AdamW(CosineDecay(2e-3, STEPS), weight_decay=0.01, moments=moments, seed=seed)
    optimizer.build(weights)
    for _ in range(STEPS):
        batch = training[generator.integers(len(training), size=BATCH)]
        optimizer.apply(_of_letters(weights, batch)[1])
    return _of_letters(weights, test)[0]


def _of_letters(w: dict[str, Any], windows: Any) -> tuple[float, dict[str, Any]]:
    """The loss and its gradients."""
    given, wanted, rows = windows[:, :-1], windows[:, -1], np.arange(len(windows))
    inputs = w["embedding"][given].reshape(len(windows), -1)
    hidden = np.maximum(inputs @ w["hidden"], 0)
    logits = hidden @ w["output"] + w["bias"]
    shifted = logits - logits.max(axis=1, keepdims=True)
    likely = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    error = np.exp(likely)
    error[rows, wanted] -= 1
    error /= len(windows)
    back = (error @ w["output"].T) * (hidden > 0)
    embedding = np.zeros_like(w["embedding"])
    np.add.at(embedding, given, (back @ w["hidden"].T).reshape(*given.shape, WIDTH))
    gradients = {
        "embedding": embedding,
        "hidden": inputs.T @ back,
        "output": hidden.T @ error,
        "bias": error.sum(axis=0),
    }
    return -float(likely[rows, wanted].mean()), gradients


PROBLEMS: dict[str, Callable[[int, str], float]] = {
    "digits": digits,
    "CO2": carbon_dioxide,
    "plate": plate,
    "letters": letters,
}


def main() -> None:
    """Train, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])  # type: ignore[union-attr]
    parser.add_argument("--seeds", type=int, default=5)
    seeds = range(parser.parse_args().seeds)
    print("| problem | " + " | ".join(MOMENTS) + " |\n|" + "---|" * (1 + len(MOMENTS)))
    for name, problem in PROBLEMS.items():
        found = [list(map(partial(problem, moments=moments), seeds)) for moments in MOMENTS]
        shown = [f"{statistics.mean(each):.5g} ± {statistics.stdev(each):.2g}" for each in found]
        print(f"| {name} | {' | '.join(shown)} |", flush=True)


if __name__ == "__main__":
    main()

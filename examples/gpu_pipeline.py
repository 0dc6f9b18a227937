"""Phase retrieval: a complex object from the magnitudes of its diffraction patterns, on a GPU if there is one.

A coherent beam (X-rays, light, electrons) passes through a diffuser and then a thin object, which absorbs some of it
and delays the rest: transmission `o = amplitude * exp(1j * phase)`. A camera far away counts the photons of
`|FFT(mask * o)|**2`, and the phase is lost. With several known diffusers (`mask`) there is enough information left to
find the object: minimize the amplitude loss

    f(o) = 1/2 sum((|F(mask * o)| - measured)**2),    measured = sqrt(photons)

whose Wirtinger gradient, df/dRe(o) + 1j df/dIm(o), is one more Fourier transform:

    sum over masks of conj(mask) * F^-1(psi - measured * psi / |psi|),    psi = F(mask * o)

The bracket replaces the computed magnitude by the measured one: the step of Gerchberg and Saxton. `AdamW` takes the
gradient as it is and updates the complex64 array in place. It starts from the empty beam, `o = 1` (from random phases
it got stuck). The object is real data: its amplitude shows some handwritten digits (data/README.md) and its phase shows
others, so a trace of one in the other would be visible. The counts have shot noise. This noise alone leaves an error of
about `1 / sqrt(all photons counted / pixels)`, and a misfit between computed and measured magnitudes of half a
photon**0.5, less what the fit absorbs: `sqrt(1 - 2 / masks) / 2`.

All arrays go through the Array API: the same functions run on CuPy, torch and NumPy. Run the example with

    python examples/gpu_pipeline.py

It takes about seven seconds on two CPU cores. `--library` selects numpy, torch or cupy; `--size`, `--steps` and
`--output` set the pixels along an edge, the number of steps and the file of the picture, which needs matplotlib.

R. W. Gerchberg, W. O. Saxton, Optik 35, 237 (1972). E. J. Candes, X. Li, M. Soltanolkotabi, "Phase retrieval via
Wirtinger flow", IEEE Trans. Inf. Theory 61, 1985 (2015), https://doi.org/10.1109/TIT.2015.2399924: the coded patterns
are theirs, but with masks of arbitrary phase instead of eight kinds.
"""

import argparse
import importlib
import statistics
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple

import numpy as np
from array_api_compat import array_namespace, device, is_cupy_array, is_torch_array, to_device

from adamw_numba import AdamW
from adamw_numba.schedules import CosineDecay

Array = Any

SEED = 0
MASKS = 8
PHOTONS = 1e4  # that hit each pixel of the object, in each exposure
LEARNING_RATE = 0.1
REQUIRED_ERROR = 0.01
ROWS = 10  # of the printed table, roughly
PICTURES = (".pdf", ".png", ".svg")


# The experiment, in NumPy


def wall_of_digits(size: int, first: int) -> Array:
    """An image (size, size) of digits from number `first` on, side by side, from 0 (paper) to 1 (ink)."""
    with np.load(Path(__file__).parent / "data" / "digits.npz") as file:
        images = file["images"]
    edge = -(-size // 32)
    chosen = images.take(range(first, first + edge * edge), axis=0, mode="wrap") / 16
    tiles = np.pad(np.kron(chosen, np.ones((1, 3, 3))), ((0, 0), (4, 4), (4, 4)))
    return tiles.reshape(edge, edge, 32, 32).swapaxes(1, 2).reshape(32 * edge, 32 * edge)[:size, :size]


def new_object(size: int) -> Array:
    """The transmission to be found: some digits absorb up to 70 % of the amplitude, others delay by up to 2 rad."""
    return (1 - 0.7 * wall_of_digits(size, first=0)) * np.exp(2j * wall_of_digits(size, first=900))


def expose(truth: Array, generator: np.random.Generator) -> tuple[Array, Array]:
    """Masks of random phase, and the photons counted behind each: two arrays (MASKS, size, size)."""
    masks = np.exp(2j * np.pi * generator.random((MASKS, *truth.shape)))
    return masks, generator.poisson(PHOTONS * np.abs(far_field(truth, masks)) ** 2)


def relative_error(estimate: Array, truth: Array) -> tuple[float, Array]:
    """The error after removing the global phase, which no magnitude reveals, and the estimate without that phase."""
    overlap = np.vdot(truth, estimate)
    aligned = estimate * (overlap.conj() / abs(overlap))
    return float(np.linalg.norm(aligned - truth) / np.linalg.norm(truth)), aligned


# The reconstruction, in any library


def far_field(estimate: Array, masks: Array) -> Array:
    """The complex wave at the camera, behind every mask; the transform preserves the sum of squares."""
    return array_namespace(estimate).fft.fftn(masks * estimate, axes=(-2, -1), norm="ortho")


def gradient(estimate: Array, masks: Array, measured: Array) -> Array:
    """The Wirtinger gradient of the amplitude loss, in the estimate's shape."""
    xp, wave = array_namespace(estimate), far_field(estimate, masks)
    magnitude = xp.abs(wave) + 1e-30  # if there is no wave, there is no phase to keep: 0, not NaN
    replaced = xp.fft.ifftn(wave * (1 - measured / magnitude), axes=(-2, -1), norm="ortho")
    return xp.sum(xp.conj(masks) * replaced, axis=0)


def misfit(estimate: Array, masks: Array, measured: Array) -> float:
    """Root mean square of computed minus measured magnitudes, in photons**0.5."""
    xp = array_namespace(estimate)
    return float(xp.mean((xp.abs(far_field(estimate, masks)) - measured) ** 2) * PHOTONS) ** 0.5


class Progress(NamedTuple):
    """The progress of the reconstruction, and the mean time of the steps since the previous row."""

    step: int
    misfit: float
    error: float
    seconds: float


def recover(estimate: Array, masks: Array, measured: Array, truth: Array, steps: int) -> Iterator[Progress]:
    """Take all steps, in place; yields a row after the first step, which compiles, and then from time to time."""
    # No weight decay: it would darken the object, and the data say how dark it is.
    optimizer = AdamW(learning_rate=CosineDecay(LEARNING_RATE, steps), beta_2=0.99, weight_decay=0.0)
    optimizer.build([estimate])
    done, interval = 0, -(-steps // ROWS)
    for row in sorted({1, *range(interval, steps, interval), steps}):
        synchronize(estimate)
        start = perf_counter()
        for _ in range(row - done):
            optimizer.apply([gradient(estimate, masks, measured)])
        synchronize(estimate)
        seconds, done = (perf_counter() - start) / (row - done), row
        error, _ = relative_error(to_numpy(estimate), truth)
        yield Progress(row, misfit(estimate, masks, measured), error, seconds)


# The libraries


def sees_gpu(library: str) -> bool:
    """Whether CuPy or torch is installed and has a GPU to run on."""
    return find_spec(library) is not None and importlib.import_module(library).cuda.is_available()


def to_library(library: str, array: Array, dtype: str) -> Array:
    """A NumPy array as one of this library, on its GPU if it has one."""
    xp = importlib.import_module(f"array_api_compat.{library}")
    return xp.asarray(array.astype(dtype), device="cuda" if library == "torch" and sees_gpu("torch") else None)


def to_numpy(array: Array) -> Array:
    """The array in NumPy, in double precision."""
    return np.asarray(to_device(array, "cpu")).astype(np.complex128)


def synchronize(array: Array) -> None:
    """Wait until the GPU has finished its work; a CPU already has."""
    if is_cupy_array(array):
        array.device.synchronize()
    elif is_torch_array(array) and array.device.type == "cuda":
        importlib.import_module("torch").cuda.synchronize(array.device)


# The picture


def save_picture(output: Path, truth: Array, estimate: Array, photons: Array, rows: list[Progress]) -> None:
    """Plot truth, estimate and error of amplitude and phase, the first pattern, and the error over the steps."""
    from matplotlib.figure import Figure

    _, aligned = relative_error(estimate, truth)
    figure = Figure(figsize=(18, 9), layout="constrained")
    axes = figure.subplots(2, 4)
    for line, name, unit, of in [(0, "Amplitude", "fraction of the beam", np.abs), (1, "Phase", "rad", np.angle)]:
        low, high = of(truth).min(), of(truth).max()
        show(axes[line, 0], of(truth), f"{name}, truth", unit, vmin=low, vmax=high)
        show(axes[line, 1], of(aligned), f"{name}, recovered", unit, vmin=low, vmax=high)
        error = of(aligned) - of(truth) if line == 0 else of(aligned * truth.conj())
        largest = np.abs(error).max()
        show(axes[line, 2], error, f"{name}, error", unit, cmap="RdBu", vmin=-largest, vmax=largest)
    show(axes[0, 3], np.log10(1 + np.fft.fftshift(photons[0])), f"Measured, 1 of {MASKS}", "log10(1 + photons)")
    steps, errors = [row.step for row in rows], [100 * row.error for row in rows]
    axes[1, 3].semilogy(steps, errors, "o-", label="recovered")
    axes[1, 3].axhline(100 * noise_limit(truth), color="gray", linestyle="--", label="shot noise alone (approximate)")
    axes[1, 3].set(title="Convergence", xlabel="step", ylabel="relative error (%)")
    axes[1, 3].legend()
    figure.savefig(output, dpi=100)


def show(axes: Any, image: Array, title: str, unit: str, **options: Any) -> None:
    """One image with its scale."""
    axes.set(title=title, xlabel="x (pixels)", ylabel="y (pixels)")
    axes.figure.colorbar(
        axes.imshow(image, **{"cmap": "gray", **options}), ax=axes, label=unit, fraction=0.046, pad=0.04
    )


def noise_limit(truth: Array) -> float:
    """The approximate relative error that shot noise alone leaves."""
    return float(1 / np.sqrt(MASKS * PHOTONS * np.mean(np.abs(truth) ** 2)))


# The command


def arguments() -> argparse.Namespace:
    """The command line, checked before anything is computed."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--library", choices=["numpy", "torch", "cupy"], help="default: the one with a GPU, or numpy")
    parser.add_argument("--size", type=int, default=256, help="pixels along an edge (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=200, help="default: %(default)s")
    parser.add_argument("--output", type=Path, default=Path("phase_retrieval.png"), help="default: %(default)s")
    given = parser.parse_args()
    for name, value, least in [("size", given.size, 16), ("steps", given.steps, 2)]:
        if value < least:
            parser.error(f"argument --{name}: {value}; expected an integer of at least {least}")
    if given.output.suffix not in PICTURES or not given.output.parent.is_dir():
        parser.error(f"argument --output: {given.output}; expected {', '.join(PICTURES)} in a folder that exists")
    if given.library and not (sees_gpu("cupy") if given.library == "cupy" else find_spec(given.library)):
        parser.error(f"argument --library: {given.library}; expected an installed library (and a GPU for cupy)")
    return given


def main() -> int:
    """Measure, recover, report; returns 0 if the relative error is small enough, else 1."""
    given = arguments()
    truth = new_object(given.size)
    masks, photons = expose(truth, np.random.default_rng(SEED))
    library = given.library or next((name for name in ("cupy", "torch") if sees_gpu(name)), "numpy")
    known = (to_library(library, masks, "complex64"), to_library(library, np.sqrt(photons / PHOTONS), "float32"))
    estimate = to_library(library, np.ones_like(truth), "complex64")
    print(f"{library} on {device(estimate)}: {given.size} x {given.size} pixels, {MASKS} masks\n")
    print("step  misfit (photons^0.5)  relative error  ms per step")
    rows = []
    for row in recover(estimate, *known, truth, given.steps):
        rows.append(row)
        print(f"{row.step:4}  {row.misfit:20.3f}  {row.error:14.3%}  {row.seconds * 1e3:11.2f}")
    return report(given, truth, to_numpy(estimate), photons, rows)


def report(given: argparse.Namespace, truth: Array, estimate: Array, photons: Array, rows: list[Progress]) -> int:
    """Print the result and save the picture; returns 0 if the object was recovered, else 1."""
    later = [row.seconds for row in rows[1:]]
    recovered = rows[-1].error < REQUIRED_ERROR
    print(f"\nTime per step: {statistics.median(later) * 1e3:.2f} ms (median of all rows except the first)")
    print(f"Shot noise alone: misfit {(1 - 2 / MASKS) ** 0.5 / 2:.3f}, relative error about {noise_limit(truth):.3%}")
    print(f"Relative error {rows[-1].error:.3%}: {'' if recovered else 'NOT '}below {REQUIRED_ERROR:.0%}, as required")
    if find_spec("matplotlib"):
        save_picture(given.output, truth, estimate, photons, rows)
        print(f"Picture: {given.output}")
    else:
        print("No picture: matplotlib is not installed; `pip install 'adamw-numba[plot]'` installs it")
    return 0 if recovered else 1


if __name__ == "__main__":
    sys.exit(main())

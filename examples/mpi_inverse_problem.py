"""The heat inverse problem of inverse_problem.py on several processes: each has a strip of the plate.

Every process keeps the diffusivity of its own rows, and one more row of each neighbour's. After each step in time it
exchanges the outermost rows of the temperature, or of the adjoint, with its neighbours: the halo. The functions that
compute a step are those of inverse_problem.py, on a strip. `adamw_numba.minimize` is given the communicator: each
process has its own rows of x, of the bounds and of the gradient, and all take the same decisions.

The value is added up row by row, in the order of the rows and on every process, so that it does not depend on how the
plate is cut (`value="same"`). So the estimate is the same on 1, 2 and 4 processes, bit for bit: compare its checksum.

    mpiexec -n 4 python -m mpi4py examples/mpi_inverse_problem.py [folder for the picture]

It takes about half a minute on two cores.
"""

import sys
import zlib
from pathlib import Path

import inverse_problem as plate
import matplotlib as mpl
import numba
import numpy as np
from mpi4py import MPI

import adamw_numba
from adamw_numba.schedules import CosineDecay

Array = np.ndarray


class Strip:
    """The rows of one process, and the halo around them.

    Attributes
    ----------
    rows : slice
        Its own rows of the plate.
    padded : slice
        The same with those of the neighbours that it keeps a copy of.
    own : slice
        Its own rows among these.
    """

    def __init__(self, comm: MPI.Comm) -> None:
        self.comm = comm
        first, stop = (plate.CELLS * k // comm.size for k in (comm.rank, comm.rank + 1))
        self.below, self.above = comm.rank > 0, comm.rank < comm.size - 1
        self.rows, self.padded = slice(first, stop), slice(first - self.below, stop + self.above)
        self.own = slice(int(self.below), int(self.below) + stop - first)

    def exchange(self, field: Array) -> None:
        """Fill the halo of a field with the outermost rows of the neighbours."""
        requests = []
        if self.below:
            requests += [self.comm.Isend(field[1], self.comm.rank - 1), self.comm.Irecv(field[0], self.comm.rank - 1)]
        if self.above:
            requests += [self.comm.Isend(field[-2], self.comm.rank + 1), self.comm.Irecv(field[-1], self.comm.rank + 1)]
        MPI.Request.Waitall(requests)

    def gathered(self, field: Array) -> Array:
        """The rows of all processes."""
        return np.concatenate(self.comm.allgather(field))


@numba.njit
def variation_of_rows(k: Array, first: int, stop: int) -> Array:
    """The part of the total variation that belongs to each of some rows."""
    result = np.zeros(stop - first)
    for i in range(first, min(stop, k.shape[0] - 1)):
        for j in range(k.shape[1] - 1):
            down, right = k[i + 1, j] - k[i, j], k[i, j + 1] - k[i, j]
            result[i - first] += plate.PENALTY * np.sqrt(down * down + right * right + plate.SMOOTHING**2)
    return result


def objective(x: Array, strip: Strip, start: Array, pictures: Array):
    """Misfit and penalty of the whole plate, and the gradient of this process's rows."""
    k = np.empty_like(start)
    k[strip.own] = x
    strip.exchange(k)
    steps = plate.STEPS_BETWEEN * len(pictures)
    u = np.empty((steps + 1, *start.shape))
    u[0] = start
    for n in range(steps):
        plate.spread(u[n], k, u[n + 1])
        strip.exchange(u[n + 1])
    gradient = np.zeros_like(k)
    plate.add_variation(k, gradient)
    values = variation_of_rows(k, strip.own.start, strip.own.stop)
    adjoint, new = np.zeros_like(k), np.zeros_like(k)
    for n in range(steps, 0, -1):
        if n % plate.STEPS_BETWEEN == 0:
            misfit = (u[n] - pictures[n // plate.STEPS_BETWEEN - 1]) / plate.NOISE**2
            values += (misfit[strip.own] ** 2).sum(axis=1) * plate.NOISE**2 / 2
            adjoint += misfit
        plate.add_sensitivity(u[n - 1], adjoint, gradient)
        plate.spread(adjoint, k, new)
        strip.exchange(new)
        adjoint, new = new, adjoint
    return strip.gathered(values).sum(), gradient[strip.own].copy()


def estimate(strip: Strip, data: plate.Experiment, iterations: int = plate.ITERATIONS):
    """Minimize together, starting from a diffusivity of 1 everywhere."""
    x0 = np.ones_like(data.truth[strip.rows])
    return adamw_numba.minimize(
        objective,
        x0,
        (strip, data.start[strip.padded], data.pictures[:, strip.padded].copy()),
        jac=True,
        bounds=[(plate.LOWEST, plate.HIGHEST)] * x0.size,
        learning_rate=CosineDecay(plate.LEARNING_RATE, iterations),
        maxiter=iterations,
        use_ema=True,
        ema_momentum=0.95,
        comm=strip.comm,
        value="same",
    )


def picture(data: plate.Experiment, k: Array, result, processes: int, path: Path) -> None:
    """Plot the truth, the estimate with the strips of the processes, and the convergence."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 3, figsize=(12, 3.8), layout="constrained", width_ratios=(1, 1, 1.3))
    for ax, field, title in zip(axes, (data.truth, k), ("true diffusivity", "estimate"), strict=False):
        image = ax.imshow(field, origin="lower", vmin=0, vmax=2.4)
        figure.colorbar(image, ax=ax, shrink=0.9)
        ax.set(title=title, xlabel="x (cells)", ylabel="y (cells)")
    for rank in range(processes):
        bottom, top = (plate.CELLS * k // processes - 0.5 for k in (rank, rank + 1))
        axes[1].axhline(bottom, color="white", linewidth=1)
        axes[1].text(3, (bottom + top) / 2, f"process {rank}", color="white", va="center", fontsize=9)
    adamw_numba.plot.convergence(result, ax=axes[2]).set_title("convergence")
    figure.savefig(path, dpi=80)
    pyplot.close(figure)


def main(folder: str = ".") -> int:
    """Estimate, report and plot; returns 0 if the estimate is good."""
    mpl.use("agg")
    strip, data = Strip(MPI.COMM_WORLD), plate.experiment()
    result = estimate(strip, data)
    k = strip.gathered(result.x_average)
    error = plate.error_of(k, data.truth)
    if strip.comm.rank == 0:
        print(
            f"{strip.comm.size} processes: {result.message} {result.nit} iterations, {result.history['time'][-1]:.1f} s"
        )
        print(f"objective {result.history['fun'][0]:.0f} at the start, {result.fun:.0f} at the end")
        print(f"relative error {error:.3f} (at most {plate.REQUIRED_ERROR} expected)")
        print(f"checksum of the estimate {zlib.crc32(k.tobytes()):08x}")
        path = Path(folder, "mpi_inverse_problem.png")
        picture(data, k, result, strip.comm.size, path)
        print(f"wrote {path}")
    return 0 if error <= plate.REQUIRED_ERROR else 1


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))

"""An inverse problem with NVIDIA Warp: the wind in a valley, and the drag of light balls, from their tracks.

400 balls are shot through an unknown wind, which is given by vectors at 5 x 5 x 5 points and interpolated between them.
A radar sees where each ball is, with an error of 20 centimetres, 20 times within 20 seconds. Warp simulates the flight,
one kernel per time step, and its tape runs backwards through all of them. That gives the gradients of the misfit, for
the wind (a `wp.array` of `wp.vec3`) and for the logarithm of the drag, and `AdamW` updates both where they lie.

    python examples/wind.py

It needs Warp, `pip install "adamw-numba[warp]"`, and takes some ten seconds on one core, without a GPU.
"""

import numpy as np
import warp as wp

from adamw_numba import AdamW
from adamw_numba.schedules import CosineDecay

BALLS, STEPS, TIME_STEP = 400, 40, 0.5  # seconds
SEEN_EVERY, NOISE = 2, 0.2  # steps; metres
POINTS, SPACING = 5, 100.0  # along each axis; metres
GRAVITY, SPEED = 1.0, 10.0  # metres per second squared, less buoyancy; metres per second
ITERATIONS, LEARNING_RATE = 150, 0.4
DRAG = 0.2  # per second: the one to be found
REQUIRED_ERROR = 0.1


@wp.func
def along_x(wind: wp.array3d(dtype=wp.vec3), i: int, j: int, k: int, weight: float):
    return wp.lerp(wind[i, j, k], wind[i + 1, j, k], weight)


@wp.func
def wind_at(wind: wp.array3d(dtype=wp.vec3), position: wp.vec3):
    """The wind between eight points, by linear interpolation; outside of the valley, as at its border."""
    last = float(POINTS - 1) - 0.001
    x = wp.clamp(position[0] / SPACING, 0.0, last)
    y = wp.clamp(position[1] / SPACING, 0.0, last)
    z = wp.clamp(position[2] / SPACING, 0.0, last)
    i, j, k = int(x), int(y), int(z)
    u, v, w = x - float(i), y - float(j), z - float(k)
    low = wp.lerp(along_x(wind, i, j, k, u), along_x(wind, i, j + 1, k, u), v)
    high = wp.lerp(along_x(wind, i, j, k + 1, u), along_x(wind, i, j + 1, k + 1, u), v)
    return wp.lerp(low, high, w)


@wp.kernel
def fly(
    wind: wp.array3d(dtype=wp.vec3),
    log_drag: wp.array(dtype=float),
    position: wp.array(dtype=wp.vec3),
    velocity: wp.array(dtype=wp.vec3),
    new_position: wp.array(dtype=wp.vec3),
    new_velocity: wp.array(dtype=wp.vec3),
):
    """One time step: the drag is proportional to the speed relative to the air."""
    i = wp.tid()
    relative = wind_at(wind, position[i]) - velocity[i]
    v = velocity[i] + TIME_STEP * (wp.exp(log_drag[0]) * relative + wp.vec3(0.0, 0.0, -GRAVITY))
    new_velocity[i] = v
    new_position[i] = position[i] + TIME_STEP * v


@wp.kernel
def add_misfit(position: wp.array(dtype=wp.vec3), seen: wp.array(dtype=wp.vec3), loss: wp.array(dtype=float)):
    """The mean squared distance to what was seen, in units of its error."""
    i = wp.tid()
    error = (position[i] - seen[i]) / NOISE
    wp.atomic_add(loss, 0, wp.dot(error, error) / (3.0 * float(BALLS * STEPS // SEEN_EVERY)))


class Flight:
    """The arrays of a simulation; a tape needs those of every step."""

    def __init__(self, rng):
        start, speeds = rng.uniform(0, SPACING * (POINTS - 1), (BALLS, 3)), rng.normal(0, SPEED, (BALLS, 3))
        self.position = [wp.array(start, dtype=wp.vec3, requires_grad=True) for _ in range(STEPS + 1)]
        self.velocity = [wp.array(speeds, dtype=wp.vec3, requires_grad=True) for _ in range(STEPS + 1)]
        self.loss = wp.zeros(1, dtype=float, requires_grad=True)

    def run(self, wind, log_drag):
        for n in range(STEPS):
            before, after = [self.position[n], self.velocity[n]], [self.position[n + 1], self.velocity[n + 1]]
            wp.launch(fly, BALLS, [wind, log_drag, *before], after)

    def misfit(self, tracks):
        self.loss.zero_()
        for n, seen in zip(range(SEEN_EVERY, STEPS + 1, SEEN_EVERY), tracks, strict=True):
            wp.launch(add_misfit, BALLS, [self.position[n], seen], [self.loss])


def true_wind():
    """A whirl around the middle of the valley, stronger above."""
    x, y, z = np.meshgrid(*[np.linspace(-1, 1, POINTS)] * 3, indexing="ij")
    strength = 4 * (1.5 + z) * np.exp(-(x**2) - y**2)
    return np.stack([2 - y * strength, x * strength, np.sin(2 * x)], axis=-1).astype(np.float32)


def observed(flight, rng):
    """The tracks in the true wind, as the radar sees them."""
    flight.run(wp.array(true_wind(), dtype=wp.vec3), wp.array([np.log(DRAG)], dtype=float))
    seen = [flight.position[n].numpy() for n in range(SEEN_EVERY, STEPS + 1, SEEN_EVERY)]
    return [wp.array(place + rng.normal(0, NOISE, place.shape), dtype=wp.vec3) for place in seen]


def main():
    wp.config.quiet = True
    wp.set_device("cpu")
    rng = np.random.default_rng(0)
    flight = Flight(rng)
    tracks = observed(flight, rng)

    model = {
        "wind": wp.zeros((POINTS, POINTS, POINTS), dtype=wp.vec3, requires_grad=True),
        "log_drag": wp.array([np.log(0.1)], dtype=float, requires_grad=True),
    }
    optimizer = AdamW(CosineDecay(LEARNING_RATE, ITERATIONS), weight_decay=0.0)
    optimizer.override(var_names=["log_drag"], learning_rate_multiplier=0.3)
    optimizer.build(model)
    where = model["wind"].ptr
    for iteration in range(ITERATIONS):
        with wp.Tape() as tape:
            flight.run(**model)
            flight.misfit(tracks)
        tape.backward(flight.loss)
        optimizer.apply({name: array.grad for name, array in model.items()})
        tape.zero()
        if iteration % 30 == 0 or iteration == ITERATIONS - 1:
            print(f"iteration {iteration:3}: misfit {flight.loss.numpy()[0]:10.3f} (1 is the noise)")
    print(optimizer)

    assert model["wind"].ptr == where  # updated in place
    drag = float(np.exp(model["log_drag"].numpy()[0]))
    error = np.sqrt(((model["wind"].numpy() - true_wind()) ** 2).sum() / (true_wind() ** 2).sum())
    print(f"drag: {drag:.4f}, true {DRAG}; relative error of the wind: {error:.3f}")
    if abs(drag / DRAG - 1) > REQUIRED_ERROR or error > REQUIRED_ERROR:
        raise SystemExit("the wind was not found")


if __name__ == "__main__":
    main()

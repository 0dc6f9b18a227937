"""AdamW from the papers, in float64 and in plain sight: what every kernel is compared with.

Nothing is shared with the library: bias-corrected moments as in Kingma & Ba (2015, algorithm 1) with the epsilon that
their "epsilon hat" stands for, decoupled decay of Loshchilov & Hutter (2019, algorithm 2), AMSGrad of Reddi et al.
(2018) on raw second moments, and Keras's order of stages; Nesterov's momentum as in optax. Complex numbers are pairs
of reals.
"""

from dataclasses import dataclass, field

import numpy as np


@dataclass
class Oracle:
    learning_rate: object = 0.001
    weight_decay: object = 0.004
    beta_1: float = 0.9
    beta_2: float = 0.999
    epsilon: float = 1e-7
    amsgrad: bool = False
    clipnorm: float | None = None
    clipvalue: float | None = None
    global_clipnorm: float | None = None
    use_ema: bool = False
    ema_momentum: float = 0.99
    ema_overwrite_frequency: int | None = None
    loss_scale_factor: float | None = None
    gradient_accumulation_steps: int | None = None
    excluded: tuple[int, ...] = ()
    decouple_lr: bool = False
    maximize: bool = False
    nesterov: bool = False
    epsilon_mode: str = "hat"
    own: dict = field(default_factory=dict)  # of a variable, by its number: what it has for itself

    micro_step: int = 0
    updates: int = 0
    variables: list = field(default_factory=list)

    def build(self, variables):
        self.variables = [pairs(v).astype(np.float64) for v in variables]
        zeros = [np.zeros_like(v) for v in self.variables]
        self.m, self.v, self.top, self.average, self.total = ([z.copy() for z in zeros] for _ in range(5))
        self.travelled = [np.zeros_like(v) for v in self.variables]

    def step(self, gradients):
        gradients = [None if g is None else pairs(g).astype(np.float64) for g in gradients]
        self.micro_step += 1
        for k, g in enumerate(gradients):
            if g is not None:
                self.total[k] = self.total[k] + g / (self.loss_scale_factor or 1)
        window = self.gradient_accumulation_steps or 1
        if self.micro_step % window:
            return
        mean = [None if g is None else total / window for g, total in zip(gradients, self.total, strict=True)]
        self.total = [t if g is None else np.zeros_like(t) for g, t in zip(gradients, self.total, strict=True)]
        self.update(self.clip(mean))

    def clip(self, gradients):
        norms = [0.0 if g is None else float(np.linalg.norm(g.ravel())) for g in gradients]
        whole = float(np.linalg.norm(norms))
        clipped = []
        for k, (g, norm) in enumerate(zip(gradients, norms, strict=True)):
            clipvalue, clipnorm = self.of(k, "clipvalue"), self.of(k, "clipnorm")
            if g is not None and clipvalue is not None:
                g = np.clip(g, -clipvalue, clipvalue)
            if g is not None and clipnorm is not None and norm > clipnorm:
                g = g * clipnorm / norm
            if g is not None and self.global_clipnorm is not None and whole > self.global_clipnorm:
                g = g * self.global_clipnorm / whole
            clipped.append(g)
        return clipped

    def of(self, k, name):
        return self.own.get(k, {}).get(name, getattr(self, name, None))

    def rate_of(self, k, name):
        rate = self.of(k, name)
        if not callable(rate):
            return rate
        try:
            return rate(self.micro_step - 1)
        except TypeError:  # it takes no step
            return rate()

    def update(self, gradients):
        self.updates += 1
        t = self.updates
        for k, g in enumerate(gradients):
            old = self.variables[k].copy()
            if g is not None:
                beta_1, beta_2, epsilon = (self.of(k, name) for name in ("beta_1", "beta_2", "epsilon"))
                rate = self.rate_of(k, "learning_rate") * self.own.get(k, {}).get("learning_rate_multiplier", 1.0)
                decay = self.rate_of(k, "weight_decay")
                g = -g if self.maximize else g
                self.m[k] = beta_1 * self.m[k] + (1 - beta_1) * g
                self.v[k] = beta_2 * self.v[k] + (1 - beta_2) * g**2
                self.top[k] = np.maximum(self.top[k], self.v[k])
                m_hat = self.m[k] / (1 - beta_1**t)
                if self.nesterov:
                    m_hat = beta_1 * self.m[k] / (1 - beta_1 ** (t + 1)) + (1 - beta_1) * g / (1 - beta_1**t)
                v_hat = (self.top[k] if self.amsgrad else self.v[k]) / (1 - beta_2**t)
                if self.epsilon_mode == "hat":
                    epsilon = epsilon / np.sqrt(1 - beta_2**t)
                if k not in self.excluded:
                    self.variables[k] = (1 - (decay if self.decouple_lr else rate * decay)) * self.variables[k]
                self.variables[k] = self.variables[k] - rate * m_hat / (np.sqrt(v_hat) + epsilon)
            mu = 0.0 if t == 1 else self.ema_momentum
            self.average[k] = mu * self.average[k] + (1 - mu) * self.variables[k]
            if self.use_ema and self.ema_overwrite_frequency and t % self.ema_overwrite_frequency == 0:
                self.variables[k] = self.average[k].copy()
            self.travelled[k] = self.travelled[k] + np.abs(self.variables[k] - old)


def pairs(array):
    """A complex array as real and imaginary parts along a new last axis."""
    array = np.asarray(array)
    return np.stack([array.real, array.imag], axis=-1) if np.iscomplexobj(array) else array

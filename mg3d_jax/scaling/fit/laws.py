"""The law and its loss: `L(N, D) = E + A / N^alpha + B / D^beta`, judged by a Huber loss on log residuals.

N is a model size (parameters), D a data size (samples, patients, tokens): any unit, the same for all rows. The form and
the objective follow Hoffmann et al. 2022 (approach 3); we take the SUM over rows, as Besiroglu et al. 2024 do.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

PARAMETERS = ("E", "A", "B", "alpha", "beta")
HUBER_DELTA = 1e-3
FORMULA = "L = E + A / N^alpha + B / D^beta"


@dataclass(frozen=True)
class Law:
    """One law in the units of its table. A term that is absent has the value 0 (`E`, `A` or `B`)."""

    E: float
    A: float
    B: float
    alpha: float
    beta: float

    def __call__(self, n: np.ndarray | float, d: np.ndarray | float) -> np.ndarray:
        """Predicted loss, in the shape of `n` and `d` broadcast together."""
        log_n, log_d = np.log(np.asarray(n, np.float64)), np.log(np.asarray(d, np.float64))
        return self.E + term(self.A, self.alpha, log_n) + term(self.B, self.beta, log_d)

    def as_dict(self) -> dict[str, float]:
        return {name: float(getattr(self, name)) for name in PARAMETERS}


def term(scale: float, exponent: float, log_size: np.ndarray) -> np.ndarray:
    """`scale / size^exponent`, computed in logs so that neither factor overflows; 0 where `scale` is 0."""
    if scale == 0:
        return np.zeros_like(log_size)
    return np.exp(np.log(scale) - exponent * log_size)


def huber(residual: np.ndarray, delta: float | np.ndarray = HUBER_DELTA) -> np.ndarray:
    """`r^2 / 2` for `|r| <= delta`, `delta (|r| - delta / 2)` beyond."""
    size = np.abs(residual)
    return np.where(size <= delta, 0.5 * residual**2, delta * (size - 0.5 * delta))


def log_residuals(law: Law, n: np.ndarray | float, d: np.ndarray | float, loss: np.ndarray | float) -> np.ndarray:
    """`log(observed) - log(predicted)`, float64 [rows], or a scalar of one row."""
    return np.log(np.asarray(loss, np.float64)) - np.log(law(n, d))


def objective(law: Law, n: np.ndarray, d: np.ndarray, loss: np.ndarray, delta: float = HUBER_DELTA) -> float:
    """The unscaled objective: the sum over the rows of Huber(`delta`) of the log residuals."""
    return float(np.sum(huber(log_residuals(law, n, d, loss), delta)))

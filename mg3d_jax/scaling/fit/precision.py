"""What a sweep will know before it is run: how wide exponents and a prediction come out, by simulation of its very runs."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import numpy as np

from mg3d_jax.scaling.fit.certified import why_refused
from mg3d_jax.scaling.fit.laws import ND, Law, predict
from mg3d_jax.scaling.fit.solver import Problem, polish

ALPHA, BETA = 0.34, 0.28  # of the simulated law: those of language models, for want of better (Hoffmann et al., 2022)
REACH = 3.0  # the prediction is at so many times the largest N and the largest D
ENOUGH_EXPONENT, ENOUGH_PREDICTION = 0.1, 0.03  # half widths of 90 % that a plan should have


@dataclass(frozen=True)
class Expected:
    """Half widths of the central 90 % over simulated sweeps.

    Args:
        alpha, beta: of the exponents; NaN where the runs allow no law.
        prediction: of the logarithm of the loss at `REACH` times the largest N and D.
        refused: why the runs allow no law, in words; "" where they do.
    """

    alpha: float
    beta: float
    prediction: float
    noise: float
    simulations: int
    refused: str = ""

    @property
    def verdict(self) -> str:
        """Why the plan is not enough, in words; "" where it is."""
        if self.refused:
            return f"not enough: {self.refused}"
        wide = [name for name in ("alpha", "beta") if not getattr(self, name) <= ENOUGH_EXPONENT]
        if wide:
            return (
                f"not enough for {' and '.join(wide)} (90 % within {ENOUGH_EXPONENT:g}): take a wider range of sizes or "
                "data, or more seeds"
            )
        if not self.prediction <= ENOUGH_PREDICTION:
            return f"not enough for a prediction to {100 * ENOUGH_PREDICTION:g} %: larger runs, or more of them"
        return ""

    def text(self) -> str:
        """A sentence for a plan."""
        found = (
            f"expected at a noise of {100 * self.noise:g} % ({self.simulations} simulated sweeps of a law with exponents "
            f"{ALPHA} and {BETA}, each term half of the floor in the middle): "
        )
        if self.refused:
            return self.verdict
        found += (
            f"alpha to {self.alpha:.2f}, beta to {self.beta:.2f}, the loss at {REACH:g} times the largest N and D to "
            f"{100 * self.prediction:.1f} % (half widths of 90 %)"
        )
        return found + (f". {self.verdict[0].upper()}{self.verdict[1:]}" if self.verdict else "")


def expected(n: np.ndarray, d: np.ndarray, *, noise: float = 0.003, simulations: int = 200, seed: int = 0) -> Expected:
    """Fits simulated losses of runs with these N and D, with independent noise of the log loss of `noise`, all at once."""
    n, d = np.asarray(n, np.float64), np.asarray(d, np.float64)
    centre_n, centre_d = np.exp(np.mean(np.log(n))), np.exp(np.mean(np.log(d)))
    truth = Law.of(ND, E=1.0, A=0.5 * centre_n**ALPHA, B=0.5 * centre_d**BETA, alpha=ALPHA, beta=BETA)
    columns, clean = {"N": n, "D": d}, np.log(truth(n, d))
    rng = np.random.default_rng(seed)
    losses = np.exp(clean + noise * rng.normal(size=(simulations, len(n))))
    if (reason := why_refused(ND, columns, losses[0])) is not None:
        return Expected(math.nan, math.nan, math.nan, noise, simulations, reason)
    problem = Problem.of(ND, columns, np.exp(clean))
    batch = dataclasses.replace(problem, z=np.log(losses) - problem.centre)
    starts = np.tile(problem.theta(truth), (simulations, 1))
    values = problem.values(polish(starts, np.ones_like(losses), batch)[0])
    names = list(ND.parameters)
    far = predict(ND, values, {"N": np.array([REACH * n.max()]), "D": np.array([REACH * d.max()])})[:, 0]
    alpha, beta = (_half_width(values[:, names.index(name)]) for name in ("alpha", "beta"))
    return Expected(alpha, beta, _half_width(np.log(far)), noise, simulations)


def _half_width(values: np.ndarray) -> float:
    """Of the central 90 %."""
    low, high = np.quantile(values, [0.05, 0.95])
    return float(high - low) / 2

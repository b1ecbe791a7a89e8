"""Are laws found again to 1e-4 from tables without noise, in other units, another order of rows, and in float32?

    python -m mg3d_jax.scaling.fit.simulate --noiseless 1000

prints a row per kind of table. Rounding to float32 is noise of some 1e-8 of the loss, which a short range of sizes multiplies:
`float32_error` is what it is expected to do, by the Jacobian of the law.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mg3d_jax.progress import track
from mg3d_jax.scaling.fit.certified import fit_form
from mg3d_jax.scaling.fit.laws import ND, Law

CLOSE = 1e-4
"""Relative difference of every parameter up to which a law counts as found again."""
UNITS = {"N": 1e-6, "D": 512.0, "loss": 3.0}
PLAIN, OTHER_UNITS, SHUFFLED, SINGLE = "as it is", "other units", "rows in another order", "float32"
KINDS = (PLAIN, OTHER_UNITS, SHUFFLED, SINGLE)
ROUNDING_SPREAD = 5.0  # standard deviations: what float32 may do to the worst of five parameters of a thousand laws


@dataclass(frozen=True)
class Found:
    """Relative errors [laws] by kind of table: of the worst parameter. `allowed`: what float32 may do [laws]."""

    errors: dict[str, np.ndarray]
    allowed: np.ndarray

    def lines(self) -> list[str]:
        """The table of the command, as Markdown."""
        said = ["| table | within 1e-4 | median error | largest error |", "|---|---|---|---|"]
        for kind, errors in self.errors.items():
            close = f"{int(np.sum(errors <= CLOSE))} of {len(errors)}"
            said.append(f"| {kind} | {close} | {np.median(errors):.1e} | {errors.max():.1e} |")
        beyond = int(np.sum(self.errors[SINGLE] > np.maximum(CLOSE, self.allowed)))
        return [*said, "", f"float32: {beyond} are off by more than 1e-4 and by more than rounding explains"]


def random_law(rng: np.random.Generator) -> tuple[Law, np.ndarray, np.ndarray]:
    """A law whose terms all matter somewhere, and the N and D [runs] of a random grid."""
    alpha, beta = rng.uniform(0.1, 1.0, 2)
    n, d = (np.geomspace(1, 10 ** rng.uniform(1.5, 3), rng.integers(4, 8)) * 10 ** rng.uniform(0, 7) for _ in range(2))
    scale = 10 ** rng.uniform(-3, 2)
    law = Law.of(
        ND,
        E=rng.uniform(0.3, 3) * scale,
        A=rng.uniform(0.2, 2) * scale * np.exp(np.log(n).mean() * alpha),
        B=rng.uniform(0.2, 2) * scale * np.exp(np.log(d).mean() * beta),
        alpha=alpha,
        beta=beta,
    )
    n, d = (v.ravel() for v in np.meshgrid(n, d))
    return law, n, d


def search(laws: int, *, first: int = 0) -> Found:
    """Fits the tables of so many random laws, in every kind."""
    errors: dict[str, list[float]] = {kind: [] for kind in KINDS}
    allowed = []
    for seed in track(range(first, first + laws), "noiseless laws", laws, unit="laws"):
        rng = np.random.default_rng([seed, 7])
        law, n, d = random_law(rng)
        loss = law(n, d)
        n_unit, d_unit, loss_unit = UNITS.values()
        order = rng.permutation(len(n))
        scaled = _fitted(n * n_unit, d * d_unit, loss * loss_unit)
        if scaled is not None:
            a = scaled["A"] / loss_unit / n_unit ** scaled["alpha"]
            b = scaled["B"] / loss_unit / d_unit ** scaled["beta"]
            scaled = Law.of(ND, **(scaled.as_dict() | {"E": scaled["E"] / loss_unit, "A": a, "B": b}))
        found = {
            PLAIN: _fitted(n, d, loss),
            OTHER_UNITS: scaled,
            SHUFFLED: _fitted(n[order], d[order], loss[order]),
            SINGLE: _fitted(*(v.astype(np.float32) for v in (n, d, loss))),
        }
        for kind, one in found.items():
            errors[kind].append(_error(one, law))
        allowed.append(float32_error(law, n, d))
    return Found({kind: np.asarray(values) for kind, values in errors.items()}, np.asarray(allowed))


def float32_error(law: Law, n: np.ndarray, d: np.ndarray) -> float:
    """Relative error that rounding of a table to float32 may cause in the worst parameter."""
    total = law(n, d)
    a, b = law["A"] / n ** law["alpha"] / total, law["B"] / d ** law["beta"] / total
    # Derivatives of the log loss by the logarithms of the parameters.
    columns = [law["E"] / total, a, b, -a * law["alpha"] * np.log(n), -b * law["beta"] * np.log(d)]
    rounding = np.finfo(np.float32).eps / np.sqrt(12)  # standard deviation, of the loss, N and D each
    variances = rounding**2 * (1 + (a * law["alpha"]) ** 2 + (b * law["beta"]) ** 2)
    inverse = np.linalg.pinv(np.stack(columns, axis=1))
    return float(ROUNDING_SPREAD * np.sqrt(np.max(inverse**2 @ variances)))


def _fitted(n: np.ndarray, d: np.ndarray, loss: np.ndarray) -> Law | None:
    return fit_form(ND, {"N": n, "D": d}, loss).law


def _error(found: Law | None, truth: Law) -> float:
    """Relative error of the worst parameter; infinite where no law was found."""
    return float("inf") if found is None else float(np.max(np.abs(np.asarray(found.values) / truth.values - 1)))

"""The forms that can be fitted: sums of power laws, and the Huber loss that judges them.

Every term is a scale times powers of sizes, so its logarithm is linear in the logarithms of its parameters' scale and in
its exponents: one solver (`solver.py`) fits them all. N is a model size (parameters), D a data size (samples, patients,
tokens), U unique data, S data seen with repeats: any unit, the same for all rows.

`nd` and its objective follow Hoffmann et al. 2022 (approach 3); we take the SUM over rows, as Besiroglu et al. 2024 do.
`nus` adds what repeating data costs: a penalty that grows with the repeats and with parameters per unique datum.

`nus-effective` is the law of data-constrained training of Muennighoff et al. 2023 (arXiv:2305.16264, equation 5): data seen
again are worth less each time. Where one more pass is worth (1 - 1 / R) of the one before, passes after the first are worth
`sum_k (1 - 1 / R)^k`, about `R (1 - exp(-r / R))` of the unique data after r repeats; so S data of which U are unique do what
`U (1 + R (1 - exp(-(S / U - 1) / R)))` fresh ones would: U at R = 0, S as R goes to infinity, (1 + R) U at most. Two things
differ from the paper. All parameters are fitted at once, where it takes E, A, B, alpha and beta from runs without repeats
first; and its second saturation, of parameters beyond what U asks for, is left out: it is defined by the optimum of the very
law that is fitted, and a sweep of a few sizes says little of it.

A loss that guessing bounds, such as a contrastive one (log of the pool's size), leaves that bound slowly: near it no sum of
powers holds. `with_chance` bends a form to it, `L = (law^-k + chance^-k)^(-1/k)`, a soft minimum of both: the law itself where
that is well below chance, chance where it is above, with a fitted sharpness k of the turn. The aim is that of the estimator
M4 of Alabdulmohsin et al. 2022 (arXiv:2209.06640), which gives random guessing its place in a law of one variable; ours is
explicit in the loss, and keeps all other parameters in their usual meaning.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
from scipy.special import expit

HUBER_DELTA = 1e-3
FLOOR, SHARPNESS = "E", "k"
ROUNDING = np.log(1e-6)
"""Fewer repeats than that are rounding of a table: the data are seen once."""


@dataclass(frozen=True)
class Term:
    """`scale * product of feature^(sign * exponent) * product of factors`; without powers and factors a constant.

    `powers` are (exponent, feature, sign); `factors` are features that enter with the exponent 1. `saturating`: the parameter
    that says how often the data of its one power may be repeated; the power is then of `U * (1 + gain)`.
    """

    scale: str
    powers: tuple[tuple[str, str, int], ...] = ()
    factors: tuple[str, ...] = ()
    saturating: str = ""


def gain(repeats: np.ndarray, most: np.ndarray) -> np.ndarray:
    """What data seen again are worth, in units of the unique data: `R (1 - exp(-repeats / R))` with R = `most`."""
    return most * -np.expm1(-repeats / most)


@dataclass(frozen=True)
class Form:
    """A kind of law. `variables` are the columns that it takes, in this order; `chance`: the loss of guessing, 0 for none."""

    name: str
    formula: str
    variables: tuple[str, ...]
    terms: tuple[Term, ...]
    chance: float = 0.0

    @property
    def scales(self) -> tuple[str, ...]:
        return tuple(term.scale for term in self.terms)

    @property
    def exponents(self) -> tuple[str, ...]:
        """Of powers, how often data may be repeated, how sharply the law turns to chance: parameters that are no scales."""
        powers = dict.fromkeys(name for term in self.terms for name, _, _ in term.powers)
        repeats = [term.saturating for term in self.terms if term.saturating]
        return (*powers, *repeats, *([SHARPNESS] if self.chance else []))

    @property
    def parameters(self) -> tuple[str, ...]:
        """Scales, then exponents: the order of every parameter vector."""
        return self.scales + self.exponents

    def own(self, scale: str) -> tuple[str, ...]:
        """The parameters that go when the term of `scale` goes."""
        others = {name for term in self.terms if term.scale != scale for name, _, _ in term.powers}
        term = self.terms[self.scales.index(scale)]
        own = [name for name, _, _ in term.powers if name not in others]
        return (scale, *own, *([term.saturating] if term.saturating else []))

    def without(self, scales: set[str]) -> Form:
        """The form that is left when these terms are dropped."""
        kept = tuple(term for term in self.terms if term.scale not in scales)
        written = formula(kept, self.chance)
        return replace(self, name=f"{self.name} without {', '.join(sorted(scales))}", terms=kept, formula=written)

    def features(self, columns: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Logarithms of what the terms are powers of, float64 [rows]; `-inf` where a penalty is absent."""
        with np.errstate(divide="ignore"):
            found = {name: np.log(np.asarray(columns[name], np.float64)) for name in self.variables}
            if "U" in found:
                found["repeats"] = np.log(np.maximum(np.exp(found["S"] - found["U"]) - 1, 0.0))
                found["N/U"] = found["N"] - found["U"]
                found["repeats"] = np.where(found["repeats"] < ROUNDING, -np.inf, found["repeats"])
        return found


def formula(terms: tuple[Term, ...], chance: float = 0.0) -> str:
    """`L = E + A / N^alpha`, with chance `L = ((E + A / N^alpha)^-k + 4.852^-k)^(-1/k)`."""
    written = []
    for term in terms:
        text = term.scale
        for exponent, feature, sign in term.powers:
            base = f"({feature})" if "/" in feature else feature
            if r := term.saturating:
                base = f"({feature} * (1 + {r} * (1 - exp(-repeats / {r}))))"
            text += f" {'/' if sign < 0 else '*'} {base}^{exponent}"
        text += "".join(f" * ({factor})" if "/" in factor else f" * {factor}" for factor in term.factors)
        written.append(text)
    law = " + ".join(written)
    return f"L = (({law})^-{SHARPNESS} + {chance:.4g}^-{SHARPNESS})^(-1/{SHARPNESS})" if chance else f"L = {law}"


def with_chance(form: Form, chance: float) -> Form:
    """`form` where guessing has the loss `chance`: it bends to that, and has one parameter more. 0: as it is."""
    return replace(form, chance=chance, formula=formula(form.terms, chance)) if chance else form


def turned(log_law: np.ndarray, log_chance: float, sharpness: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Logarithm of the soft minimum of law and chance, and its derivative by that of the law: 1 far below chance, 0 above."""
    over = sharpness * (log_law - log_chance)
    weight = expit(-over)
    return np.where(over < 0, log_law, log_chance) - np.log1p(np.exp(-np.abs(over))) / sharpness, weight


def _form(name: str, variables: tuple[str, ...], *terms: Term) -> Form:
    return Form(name, formula(terms), variables, terms)


_E, _A, _B = Term("E"), Term("A", (("alpha", "N", -1),)), Term("B", (("beta", "D", -1),))
_SEEN = Term("B", (("beta", "S", -1),))
FORMS: dict[str, Form] = {
    form.name: form
    for form in (
        _form("nd", ("N", "D"), _E, _A, _B),
        _form("nd-tied", ("N", "D"), _E, Term("A", (("gamma", "N", -1),)), Term("B", (("gamma", "D", -1),))),
        _form("nd-no-floor", ("N", "D"), _A, _B),
        _form("x", ("x",), _E, Term("A", (("alpha", "x", -1),))),
        _form("x-no-floor", ("x",), Term("A", (("alpha", "x", -1),))),
        _form("nus", ("N", "U", "S"), _E, _A, _SEEN, Term("P", (("delta", "repeats", 1), ("kappa", "N/U", 1)))),
        _form("nus-1", ("N", "U", "S"), _E, _A, _SEEN, Term("P", (), ("repeats", "N/U"))),
        _form("nus-effective", ("N", "U", "S"), _E, _A, Term("B", (("beta", "U", -1),), saturating="R")),
    )
}
"""`repeats` is S / U - 1: how often data are seen again."""
ND = FORMS["nd"]


@dataclass(frozen=True)
class Law:
    """One law in the units of its table. A term that is absent has the scale 0."""

    form: Form
    values: tuple[float, ...]  # in the order of `form.parameters`

    @classmethod
    def of(cls, form: Form, **values: float) -> Law:
        return cls(form, tuple(float(values[name]) for name in form.parameters))

    def __getitem__(self, name: str) -> float:
        return self.values[self.form.parameters.index(name)]

    def __call__(self, *columns: np.ndarray | float) -> np.ndarray:
        """Predicted loss; `columns` are those of `form.variables`, broadcast together."""
        arrays = dict(zip(self.form.variables, np.broadcast_arrays(*map(np.float64, columns)), strict=True))
        return predict(self.form, np.asarray(self.values)[None], arrays)[0]

    def as_dict(self) -> dict[str, float]:
        return dict(zip(self.form.parameters, self.values, strict=True))


def predict(form: Form, values: np.ndarray, columns: Mapping[str, np.ndarray]) -> np.ndarray:
    """Losses [laws, ...] of many laws: `values` [laws, parameters], `columns` arrays of one shape [...].

    Terms are computed in logs, so that neither a scale nor a power overflows.
    """
    features = form.features(columns)
    shape = np.shape(columns[form.variables[0]])
    total = np.zeros((len(values), *shape))
    for term in form.terms:
        scale = values[:, form.parameters.index(term.scale)]
        with np.errstate(divide="ignore", over="ignore"):
            log_term = np.log(scale).reshape(-1, *([1] * len(shape)))
            for exponent, feature, sign in term.powers:
                power = values[:, form.parameters.index(exponent)].reshape(log_term.shape[0], *([1] * len(shape)))
                x = features[feature]
                if term.saturating:
                    most = values[:, form.parameters.index(term.saturating)].reshape(power.shape)
                    x = x + np.log1p(gain(np.exp(features["repeats"]), most))
                log_term = log_term + sign * power * x
            for factor in term.factors:
                log_term = log_term + features[factor]
            total += np.exp(log_term)
    if form.chance:
        sharpness = values[:, form.parameters.index(SHARPNESS)].reshape(-1, *([1] * len(shape)))
        with np.errstate(divide="ignore"):
            return np.exp(turned(np.log(total), np.log(form.chance), sharpness)[0])
    return total


def huber(residual: np.ndarray, delta: float | np.ndarray = HUBER_DELTA) -> np.ndarray:
    """`r^2 / 2` for `|r| <= delta`, `delta (|r| - delta / 2)` beyond."""
    size = np.abs(residual)
    return np.where(size <= delta, 0.5 * residual**2, delta * (size - 0.5 * delta))


def log_residuals(law: Law, columns: Mapping[str, np.ndarray], loss: np.ndarray) -> np.ndarray:
    """`log(observed) - log(predicted)`, float64 [rows]."""
    return np.log(np.asarray(loss, np.float64)) - np.log(law(*(columns[name] for name in law.form.variables)))

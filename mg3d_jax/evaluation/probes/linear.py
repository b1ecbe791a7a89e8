"""The linear probe: logistic regression on frozen embeddings, its penalty chosen on patients that it was not fitted to."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mg3d_jax.errors import UserError
from mg3d_jax.evaluation.probes.logistic import fit_binary, fit_multinomial

KINDS = ("multi_label", "multi_class")
PENALTIES = tuple(float(c) for c in np.logspace(-5, 1, 7))  # scikit-learn's C, for standardised embeddings
UNDECIDED = 1e-2  # where no validation part can choose
VALIDATION_SHARE = 0.2  # of the patients


class FewClassesError(UserError):
    """The training volumes of a multi-class probe show fewer than two classes."""


@dataclass(frozen=True)
class ProbeResult:
    """A fitted probe and what it says of other volumes.

    Attributes:
        scores: float64 `[n, L]`, logits of the volumes it was asked about. Log-odds of each class for "multi_label"; for
            "multi_class" their softmax over L is the probability.
        weight, bias: float64 `[k, L]` and `[L]` of the head: `logits = embeddings @ weight + bias`. Standardisation is
            folded into them.
        penalties: `[L]`, the C of every class, the same for all with "multi_class".
        not_learned: columns of which the training volumes show one outcome only. Their weights are 0, so that they score
            every volume alike.
        at_edge: columns whose C is the smallest or largest of those tried.
    """

    scores: np.ndarray
    weight: np.ndarray
    bias: np.ndarray
    penalties: np.ndarray
    not_learned: tuple[int, ...]
    at_edge: tuple[int, ...]


def class_of(labels: np.ndarray) -> np.ndarray:
    """The class `[n]` of rows of labels `[n, L]`: the one that is present; -1 (unknown) where none or several are."""
    present = labels == 1
    return np.where(present.sum(axis=1) == 1, present.argmax(axis=1), -1)


def validation_part(patients: np.ndarray, seed: int) -> np.ndarray:
    """bool `[n]`: the volumes of a fifth of the patients, at least one; none where there is one patient only."""
    names = np.unique(patients)
    count = max(1, round(VALIDATION_SHARE * len(names))) if len(names) > 1 else 0
    return np.isin(patients, np.random.default_rng(seed).permutation(names)[:count])


def linear_probe(
    train_x: np.ndarray,
    train_y: np.ndarray,
    train_patients: np.ndarray,
    test_x: np.ndarray,
    *,
    seed: int = 0,
    kind: str = "multi_label",
    penalties: tuple[float, ...] = PENALTIES,
) -> ProbeResult:
    """Fits a linear probe and applies it.

    Embeddings are standardised by the mean and deviation of the training volumes. C is the one with the smallest log loss
    on the validation part, a fifth of the training patients, for each class by itself ("multi_class": one C); then the
    probe is fitted to all training volumes. A class that the validation part cannot decide gets the median C of the others.

    Args:
        train_x: `[n, k]`. train_y: int `[n, L]`, 1 present, 0 absent, -1 unknown. train_patients: `[n]`.
        test_x: `[m, k]`.
        kind: "multi_class": the class of a volume is its one present label (`class_of`); others are left out.

    Raises:
        UserError: there are no training volumes, shapes do not fit, or embeddings are not finite.
    """
    _check(train_x, train_y, train_patients, test_x, kind)
    x = train_x.astype(np.float64)
    mean, deviation = x.mean(axis=0), x.std(axis=0)
    deviation = np.where(deviation > 0, deviation, 1.0)
    x = (x - mean) / deviation
    held = validation_part(train_patients, seed)
    fit = _multi_class if kind == "multi_class" else _multi_label
    weights, chosen, learned = fit(x, train_y, held, penalties)
    weight = weights[:-1] / deviation[:, None]
    bias = weights[-1] - mean @ weight
    edges = {penalties[0], penalties[-1]} if len(penalties) > 1 else set()
    return ProbeResult(
        scores=test_x.astype(np.float64) @ weight + bias,
        weight=weight,
        bias=bias,
        penalties=chosen,
        not_learned=tuple(int(i) for i in np.flatnonzero(~learned)),
        at_edge=tuple(int(i) for i in np.flatnonzero(learned) if chosen[i] in edges),
    )


def _check(train_x: np.ndarray, train_y: np.ndarray, train_patients: np.ndarray, test_x: np.ndarray, kind: str) -> None:
    if kind not in KINDS:
        raise UserError(f"a probe of kind {kind!r} is unknown: choose one of {', '.join(KINDS)}")
    if not len(train_x):
        raise UserError("a probe needs labelled training volumes: there are none")
    if not (len(train_x) == len(train_y) == len(train_patients)) or train_x.shape[1] != test_x.shape[1]:
        raise UserError(
            f"the probe's inputs do not fit: {train_x.shape} training embeddings with {train_y.shape} labels of "
            f"{len(train_patients)} patients, {test_x.shape} embeddings to score"
        )
    for what, array in (("training", train_x), ("evaluated", test_x)):
        if bad := int(np.sum(~np.isfinite(array).all(axis=1))):
            raise UserError(f"{bad} of the {len(array)} {what} embeddings have values that are not numbers")


Fit = tuple[np.ndarray, np.ndarray, np.ndarray]  # weights [k + 1, L], C [L], learned [L]


def _multi_label(x: np.ndarray, y: np.ndarray, held: np.ndarray, penalties: tuple[float, ...]) -> Fit:
    count = y.shape[1]
    learned, decidable = _both(y), _both(y[~held]) & (y[held] >= 0).any(axis=0)
    chosen, start = np.full(count, np.nan), np.zeros((x.shape[1] + 1, count))
    if len(penalties) == 1:
        chosen[:], decidable = penalties[0], np.zeros(count, bool)
    if columns := list(np.flatnonzero(decidable)):
        # Problems by class, then by C.
        many = np.repeat(y[:, columns], len(penalties), axis=1)
        fits = fit_binary(x[~held], many[~held], np.tile(penalties, len(columns)), tolerance=1e-3)
        logits = (x[held] @ fits[:-1] + fits[-1]).reshape(-1, len(columns), len(penalties))
        truth = y[held][:, columns][:, :, None]
        losses = np.logaddexp(0.0, np.where(truth == 1, -logits, logits)).mean(axis=0, where=truth >= 0)
        best = losses.argmin(axis=1)
        chosen[columns] = np.array(penalties)[best]
        start[:, columns] = fits.reshape(len(fits), len(columns), -1)[:, np.arange(len(columns)), best]
    chosen = np.where(np.isnan(chosen), _median(chosen, penalties), chosen)
    weights = np.zeros_like(start)
    if learned.any():
        weights[:, learned] = fit_binary(x, y[:, learned], chosen[learned], start[:, learned])
    for column in np.flatnonzero(~learned):  # log-odds of what was seen, and one more of either
        weights[-1, column] = np.log1p(np.sum(y[:, column] == 1)) - np.log1p(np.sum(y[:, column] == 0))
    return weights, chosen, learned


def _multi_class(x: np.ndarray, y: np.ndarray, held: np.ndarray, penalties: tuple[float, ...]) -> Fit:
    classes, count = class_of(y), y.shape[1]
    known = classes >= 0
    seen = np.unique(classes[known])
    if len(seen) < 2:
        raise FewClassesError(
            f"a multi-class probe needs training volumes of at least two classes, found {len(seen)}: a volume's class is "
            "its only present label"
        )
    columns = np.searchsorted(seen, classes)
    fitted, judged = known & ~held, known & held & np.isin(classes, seen)
    best, start = UNDECIDED if len(penalties) > 1 else penalties[0], None
    if len(penalties) > 1 and judged.any() and fitted.any():
        losses: list[float] = []
        fits: list[np.ndarray] = []
        for penalty in penalties:
            warm = fits[-1] if fits else None
            fits.append(fit_multinomial(x[fitted], columns[fitted], len(seen), penalty, warm))
            losses.append(_log_loss(x[judged] @ fits[-1][:-1] + fits[-1][-1], columns[judged]))
        place = int(np.argmin(losses))
        best, start = penalties[place], fits[place]
    weights = np.zeros((x.shape[1] + 1, count))
    weights[-1] = -np.inf  # a class that was never seen has no probability
    weights[:, seen] = fit_multinomial(x[known], columns[known], len(seen), best, start)
    return weights, np.full(count, best), np.isin(np.arange(count), seen)


def _log_loss(logits: np.ndarray, classes: np.ndarray) -> float:
    from scipy.special import logsumexp

    return float(np.mean(logsumexp(logits, axis=1) - logits[np.arange(len(logits)), classes]))


def _both(y: np.ndarray) -> np.ndarray:
    """Which columns have both outcomes."""
    return (y == 1).any(axis=0) & (y == 0).any(axis=0)


def _median(chosen: np.ndarray, penalties: tuple[float, ...]) -> float:
    """The middle of what other classes chose, one of `penalties`."""
    known = np.sort(chosen[~np.isnan(chosen)])
    return float(known[len(known) // 2]) if len(known) else UNDECIDED

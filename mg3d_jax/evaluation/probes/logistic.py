"""Logistic regression with an L2 penalty: many binary problems on the same rows at once, and one of several classes.

The penalty is scikit-learn's: `C * sum of losses + 0.5 * |w|^2`, the bias free. Binary problems are solved together, because
one product with a matrix of their weights takes hardly longer than one with a vector: all labels at all values of C are
18 x 7 columns of one call.
"""

from __future__ import annotations

import numpy as np

MAX_NEWTON, MAX_CONJUGATE, MAX_HALVINGS = 100, 50, 30
SUFFICIENT = 1e-4  # share of the expected decrease that a step must give (Armijo)


def fit_binary(
    x: np.ndarray,
    labels: np.ndarray,
    penalties: np.ndarray,
    start: np.ndarray | None = None,
    tolerance: float = 1e-5,
) -> np.ndarray:
    """Weights `[k + 1, p]` of p problems, the bias last: Newton's method with conjugate gradients for its linear systems and
    halving of steps that go too far (Nocedal and Wright 2006, algorithm 7.1), each column by itself.

    Args:
        x: float64 `[n, k]`, of about unit scale.
        labels: int8 `[n, p]`: 1, 0, or -1 where a row does not count. Each column needs a 1 and a 0.
        penalties: `[p]`, scikit-learn's C.
        start: `[k + 1, p]`; zeros without it.
        tolerance: a column is done when its gradient is that small, relative to that of zero weights.
    """
    k = x.shape[1]
    found = np.zeros((k + 1, labels.shape[1])) if start is None else start.astype(np.float64)
    ridge = np.ones((k + 1, 1))
    ridge[-1] = 0.0
    scale = 1.0 / np.asarray(penalties, np.float64)
    problem = _Problem(x, labels, ridge * scale)
    columns = np.arange(labels.shape[1])
    first = np.linalg.norm(problem.gradient(np.zeros_like(found), columns)[0], axis=0)
    for _ in range(MAX_NEWTON):
        gradient, curvature = problem.gradient(found[:, columns], columns)
        going = np.linalg.norm(gradient, axis=0) > tolerance * first[columns]
        columns, gradient, curvature = columns[going], gradient[:, going], curvature[:, going]
        if not len(columns):
            break
        step = problem.newton_step(gradient, curvature, columns)
        moved = problem.search(found[:, columns], step, gradient, columns)
        stuck = np.all(moved == found[:, columns], axis=0)  # no smaller value in floating point: as good as it gets
        found[:, columns] = moved
        columns = columns[~stuck]
    return found


class _Problem:
    """Value, gradient and curvature of the columns that are still on their way."""

    def __init__(self, x: np.ndarray, labels: np.ndarray, ridge: np.ndarray):
        self.x, self.ridge = x, ridge
        self.known = labels >= 0
        self.sign = np.where(labels == 1, 1.0, -1.0)

    def logits(self, weights: np.ndarray) -> np.ndarray:
        return self.x @ weights[:-1] + weights[-1]

    def transposed(self, rows: np.ndarray) -> np.ndarray:
        return np.concatenate([self.x.T @ rows, rows.sum(axis=0, keepdims=True)])

    def value(self, weights: np.ndarray, columns: np.ndarray) -> np.ndarray:
        losses = np.logaddexp(0.0, -self.sign[:, columns] * self.logits(weights))
        penalty = 0.5 * np.sum(self.ridge[:, columns] * weights**2, axis=0)
        return np.sum(losses, axis=0, where=self.known[:, columns]) + penalty

    def gradient(self, weights: np.ndarray, columns: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """`[k + 1, p]`, and the second derivative of each row's loss `[n, p]`."""
        from scipy.special import expit

        sign, known = self.sign[:, columns], self.known[:, columns]
        wrong = expit(-sign * self.logits(weights)) * known
        return self.transposed(-sign * wrong) + self.ridge[:, columns] * weights, wrong * (1.0 - wrong) * known

    def newton_step(self, gradient: np.ndarray, curvature: np.ndarray, columns: np.ndarray) -> np.ndarray:
        """Solves `Hessian @ step = -gradient`, more exactly the nearer the minimum is."""
        ridge = self.ridge[:, columns]
        step, residual = np.zeros_like(gradient), -gradient
        direction, squared = residual.copy(), np.sum(residual**2, axis=0)
        norm = np.sqrt(squared)
        enough = np.minimum(0.1, np.sqrt(norm / np.maximum(norm.max(), 1e-300))) * norm
        for _ in range(MAX_CONJUGATE):
            going = np.sqrt(squared) > enough
            if not going.any():
                break
            product = self.transposed(curvature * self.logits(direction)) + ridge * direction
            length = going * squared / np.maximum(np.sum(direction * product, axis=0), 1e-300)
            step += length * direction
            residual -= length * product
            fresh = np.sum(residual**2, axis=0)
            direction = residual + np.where(going, fresh / np.maximum(squared, 1e-300), 0.0) * direction
            squared = np.where(going, fresh, squared)
        return step

    def search(self, weights: np.ndarray, step: np.ndarray, gradient: np.ndarray, columns: np.ndarray) -> np.ndarray:
        """Half the step until the value falls enough, column by column; a column that never does stays."""
        before, slope = self.value(weights, columns), np.sum(gradient * step, axis=0)
        length, open_ = np.ones(len(columns)), np.ones(len(columns), bool)
        for _ in range(MAX_HALVINGS):
            after = self.value(weights + length * step, columns)
            open_ = ~(after <= before + SUFFICIENT * length * slope)
            if not open_.any():
                break
            length[open_] /= 2
        return np.where(open_, weights, weights + length * step)


def fit_multinomial(
    x: np.ndarray, classes: np.ndarray, count: int, penalty: float, start: np.ndarray | None = None
) -> np.ndarray:
    """Weights `[k + 1, count]` of a softmax over `count` classes, the bias last, by L-BFGS.

    Args:
        x: float64 `[n, k]`. classes: int `[n]`, each from 0 to count - 1.
        penalty: scikit-learn's C.
    """
    from scipy.optimize import minimize
    from scipy.special import logsumexp

    n, k = x.shape
    picked = np.arange(n), classes

    def loss(flat: np.ndarray) -> tuple[float, np.ndarray]:
        """Per row, so that the solver's tolerances mean the same for any number of rows."""
        weights = flat.reshape(k + 1, count)
        logits = x @ weights[:-1] + weights[-1]
        log_sum = logsumexp(logits, axis=1)
        wrong = np.exp(logits - log_sum[:, None])
        wrong[picked] -= 1.0
        gradient = np.concatenate([x.T @ wrong + weights[:-1] / penalty, wrong.sum(axis=0, keepdims=True)])
        value = np.sum(log_sum - logits[picked]) + 0.5 * np.sum(weights[:-1] ** 2) / penalty
        return float(value) / n, gradient.ravel() / n

    first = np.zeros((k + 1, count)) if start is None else start
    options = {"maxiter": 1000, "gtol": 1e-6, "ftol": 1e-12}
    return minimize(loss, first.ravel(), jac=True, method="L-BFGS-B", options=options).x.reshape(k + 1, count)

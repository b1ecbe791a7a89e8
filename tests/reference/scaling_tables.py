"""Tables of runs whose law is known."""

from dataclasses import asdict, dataclass

import numpy as np

PARAMETERS = ("E", "A", "B", "alpha", "beta")


@dataclass(frozen=True)
class Law:
    """`L = E + A / N^alpha + B / D^beta`, written down as it is read."""

    E: float
    A: float
    B: float
    alpha: float
    beta: float

    def __call__(self, n, d):
        return (
            self.E + self.A / np.asarray(n, np.float64) ** self.alpha + self.B / np.asarray(d, np.float64) ** self.beta
        )

    def as_dict(self):
        return asdict(self)

    @classmethod
    def fitted(cls, fit):
        return cls(**fit.law.as_dict())


def huber(residual, delta=1e-3):
    size = np.abs(residual)
    return np.where(size <= delta, 0.5 * residual**2, delta * (size - 0.5 * delta))


def objective(law, n, d, loss):
    return float(np.sum(huber(np.log(loss) - np.log(law(n, d)))))


CHINCHILLA = Law(E=1.8172, A=482.01, B=2085.43, alpha=0.3478, beta=0.3658)  # Besiroglu et al. 2024


def grid(law: Law, sizes: int = 5, noise: float = 0.0, seed: int = 0, repeats: int = 1):
    n, d = (v.ravel() for v in np.meshgrid(np.geomspace(1e6, 1e8, sizes), np.geomspace(1e3, 1e5, sizes)))
    n, d = np.repeat(n, repeats), np.repeat(d, repeats)
    return n, d, law(n, d) * np.exp(noise * np.random.default_rng(seed).normal(size=len(n)))


def typical_law() -> Law:
    return Law(E=1.0, A=1.5 * 1e7**0.4, B=1.2 * 1e4**0.35, alpha=0.4, beta=0.35)


def chinchilla_like(noise: float, degrees: float, seed: int):
    """245 runs in the published ranges; D follows from budgets, so N and D are correlated as in the real table."""
    rng = np.random.default_rng(seed)
    n = 10 ** rng.uniform(np.log10(4e7), np.log10(1.6e10), 245)
    d = np.clip(10 ** rng.uniform(18.5, 22, 245) / (6 * n), 1e8, 1e12)
    return n, d, CHINCHILLA(n, d) * np.exp(noise * rng.standard_t(degrees, 245))

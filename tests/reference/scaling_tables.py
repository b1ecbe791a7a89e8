"""Tables of runs whose law is known."""

import numpy as np

from mg3d_jax.scaling.fit.laws import Law

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

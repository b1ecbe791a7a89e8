"""What a finding of a phantom is, and how the samplers choose side, lobes and places for one."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mg3d_jax.phantom.anatomy import LOBES, Anatomy, place_in_lobe
from mg3d_jax.phantom.canvas import triple


@dataclass(frozen=True)
class Blob:
    """An ellipsoid: centre [3] and radii [3], mm."""

    centre: tuple[float, float, float]
    radii: tuple[float, float, float]


@dataclass(frozen=True)
class Finding:
    """One abnormality of one scan: what the report may say, and the geometry that is drawn.

    `side` is "right", "left", "bilateral" or "" (midline); `lobes` are names of `LOBES`; `sizes_mm` are what a reader
    would measure, largest first; `kind` tells variants apart (a pacemaker, a port).
    """

    name: str
    side: str = ""
    lobes: tuple[str, ...] = ()
    sizes_mm: tuple[int, ...] = ()
    kind: str = ""
    severity: str = "moderate"
    blobs: tuple[Blob, ...] = ()
    seed: int = 0


def side_of(lobes: tuple[str, ...]) -> str:
    """Right, left or bilateral: from names of `LOBES`."""
    sides = {lobe.split()[0] for lobe in lobes}
    return sides.pop() if len(sides) == 1 else "bilateral"


def choose_lobes(rng: np.random.Generator, low: int, high: int, among: tuple[str, ...] = LOBES) -> tuple[str, ...]:
    """`low` to `high` different lobes, in the order of `among`."""
    count = min(int(rng.integers(low, high + 1)), len(among))
    chosen = rng.choice(len(among), count, replace=False)
    return tuple(among[index] for index in sorted(chosen))


def new_seed(rng: np.random.Generator) -> int:
    """A seed for what is drawn: the same texture in every reconstruction of the scan."""
    return int(rng.integers(2**31))


def choose_side(rng: np.random.Generator, bilateral: float) -> str:
    """Bilateral with that probability, else right or left."""
    return "bilateral" if rng.random() < bilateral else ("right", "left")[int(rng.integers(2))]


def signs_of(side: str) -> tuple[int, ...]:
    """The signs of x on that side: +1 right, -1 left."""
    return {"right": (1,), "left": (-1,), "bilateral": (1, -1)}[side]


def blobs_in_lobes(
    rng: np.random.Generator, a: Anatomy, lobes: tuple[str, ...], per_lobe: tuple[int, int], radius: tuple[float, float]
) -> tuple[Blob, ...]:
    """A few blobs in each lobe, `radius` mm (low, high), slightly flattened."""
    blobs = []
    for lobe in lobes:
        for _ in range(int(rng.integers(per_lobe[0], per_lobe[1] + 1))):
            size = float(rng.uniform(*radius))
            centre = place_in_lobe(rng, a, lobe, min(size, 22.0))
            radii = triple(float(size * s) for s in rng.uniform(0.85, 1.1, 3))
            blobs.append(Blob(triple(map(float, centre)), radii))
    return tuple(blobs)


def diameters(blobs: tuple[Blob, ...]) -> tuple[int, ...]:
    """The longest diameter of each blob in whole mm, largest first."""
    return tuple(sorted((round(2 * max(blob.radii)) for blob in blobs), reverse=True))

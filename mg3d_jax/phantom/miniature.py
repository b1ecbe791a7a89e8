"""Small procedural scans with masks: what the miniatures of data sets (`phantom/layouts`) are made of.

A miniature is a chest of `phantom.anatomy` on a grid of 7 to 8 mm voxels, drawn in a hundredth of a second, into which
lesions are put; the class of each voxel is kept beside it. Nothing here is a real scan.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import numpy as np

from mg3d_jax.batch import AIR_HU, HIGHEST_HU
from mg3d_jax.data.abnormalities import ABNORMALITIES
from mg3d_jax.phantom.abnormalities import FINDINGS, adapt_anatomy
from mg3d_jax.phantom.anatomy import LOBES, draw_anatomy, place_in_lobe, sample_anatomy
from mg3d_jax.phantom.canvas import Canvas, triple
from mg3d_jax.phantom.finding import Blob

Triple = tuple[float, float, float]
SPACING: Triple = (7.0, 7.0, 8.0)  # mm
_EXTENT = np.array([300.0, 220.0, 290.0])  # mm


def stream(layout: str, seed: int, *numbers: int) -> np.random.Generator:
    """The random numbers of one case of a layout: the same however many cases there are."""
    key = (zlib.crc32(layout.encode()), *numbers)
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=key))


class Miniature:
    """A chest, and the class of each voxel.

    Args:
        rng: of anatomy and findings.
        findings: names of `ABNORMALITIES` to draw.
        spacing: mm of the voxels, RAS+.

    Attributes:
        mask: int8 [X, Y, Z], 0 where nothing was put.
        affine: voxel -> mm (RAS+), float64 [4, 4].
    """

    def __init__(self, rng: np.random.Generator, findings: Sequence[str] = (), spacing: Triple = SPACING):
        presence = {name: name in findings for name in ABNORMALITIES}
        age, sex = int(rng.integers(40, 85)), ("M", "F")[int(rng.integers(2))]
        self.age, self.sex = age, sex
        self.anatomy = adapt_anatomy(rng, sample_anatomy(rng, age=age, sex=sex), presence)
        step = np.array(spacing)
        shape = np.ceil(_EXTENT / step).astype(int)
        origin = np.round(rng.normal(0, 4, 3) - step * (shape - 1) / 2, 2)
        self.canvas = Canvas(*(o + s * np.arange(n) for o, s, n in zip(origin, step, shape, strict=True)))
        self.affine = np.diag([*step, 1.0])
        self.affine[:3, 3] = origin
        draw_anatomy(self.canvas, self.anatomy)
        for name, (sample, draw) in FINDINGS.items():
            if presence[name]:
                draw(self.canvas, self.anatomy, sample(rng, self.anatomy))
        self.mask = np.zeros(self.canvas.hu.shape, np.int8)

    def lesion(
        self, rng: np.random.Generator, radius: tuple[float, float], value: float, *, label: int = 1, lobe: str = ""
    ) -> Blob:
        """Draws an ellipsoid of `value` HU in a lobe of the lung (a random one without a name) and marks it with `label`.

        Args:
            radius: smallest and largest, mm.
        """
        lobe = lobe or LOBES[int(rng.integers(len(LOBES)))]
        size = float(rng.uniform(*radius))
        centre = triple(map(float, place_in_lobe(rng, self.anatomy, lobe, min(size, 22.0))))
        blob = Blob(centre, triple(float(size * s) for s in rng.uniform(0.85, 1.15, 3)))
        self.canvas.ellipsoid(blob.centre, blob.radii, value, in_lung=True)
        self.mark(blob, label, within=self.canvas.lung > 0.5)
        return blob

    def mark(self, blob: Blob, label: int, within: np.ndarray | None = None) -> None:
        """Gives the voxels whose centre lies in an ellipsoid, and `within`, the class `label`."""
        parts = [((axis - c) / r) ** 2 for axis, c, r in zip(self.canvas.grid, blob.centre, blob.radii, strict=True)]
        inside = parts[0] + parts[1] + parts[2] <= 1
        self.mask[inside if within is None else inside & within] = label

    def hounsfield(self, rng: np.random.Generator, noise: float = 12.0) -> np.ndarray:
        """int16 HU [X, Y, Z], RAS+, with the noise of a scanner (standard deviation in HU)."""
        hu = self.canvas.hu + np.float32(noise) * rng.standard_normal(self.canvas.hu.shape, np.float32)
        return np.clip(np.rint(hu), AIR_HU, HIGHEST_HU).astype(np.int16)

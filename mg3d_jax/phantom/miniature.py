"""Small procedural scans with masks: what the miniatures of data sets (`phantom/layouts`) are made of.

A miniature is a chest of `phantom.anatomy` on a grid of about 7 mm, drawn in a hundredth of a second, into which lesions are
put; the class of each voxel is kept beside it. Nothing here is a real scan.
"""

from __future__ import annotations

import io
import zlib
from collections.abc import Mapping, Sequence

import numpy as np

from mg3d_jax.batch import AIR_HU, HIGHEST_HU
from mg3d_jax.data.abnormalities import ABNORMALITIES
from mg3d_jax.errors import UserError
from mg3d_jax.phantom.abnormalities import FINDINGS, adapt_anatomy
from mg3d_jax.phantom.anatomy import LOBES, Anatomy, draw_anatomy, place_in_lobe, sample_anatomy
from mg3d_jax.phantom.canvas import Canvas, triple
from mg3d_jax.phantom.finding import Blob, Finding

Triple = tuple[float, float, float]
SPACING: Triple = (7.0, 7.0, 8.0)  # mm
CHEST: Triple = (300.0, 220.0, 290.0)  # mm


def stream(layout: str, seed: int, *numbers: int) -> np.random.Generator:
    """The random numbers of one case of a layout: the same however many cases there are."""
    key = (zlib.crc32(layout.encode()), *numbers)
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=key))


def with_noise(rng: np.random.Generator, hu: np.ndarray, deviation: float = 12.0) -> np.ndarray:
    """int16 HU with the noise of a scanner (`deviation` in HU)."""
    noisy = hu + np.float32(deviation) * rng.standard_normal(hu.shape, np.float32)
    return np.clip(np.rint(noisy), AIR_HU, HIGHEST_HU).astype(np.int16)


class Grid:
    """An empty canvas that is never quite in the middle, and the class of each voxel.

    Args:
        extent: mm along x, y, z. spacing: mm of the voxels, RAS+.

    Attributes:
        canvas: what is drawn on.
        mask: int8 [X, Y, Z], 0 where nothing was put.
        affine: voxel -> mm (RAS+), float64 [4, 4].
    """

    def __init__(self, rng: np.random.Generator, extent: Triple, spacing: Triple):
        step = np.array(spacing)
        shape = np.ceil(np.array(extent) / step).astype(int)
        origin = np.round(rng.normal(0, 4, 3) - step * (shape - 1) / 2, 2)
        self.canvas = Canvas(*(o + s * np.arange(n) for o, s, n in zip(origin, step, shape, strict=True)))
        self.affine = np.diag([*step, 1.0])
        self.affine[:3, 3] = origin
        self.mask = np.zeros(self.canvas.hu.shape, np.int8)

    def mark(self, blob: Blob, label: int, within: np.ndarray | None = None) -> None:
        """Gives the voxels whose centre lies in an ellipsoid, and `within`, the class `label`."""
        parts = [((axis - c) / r) ** 2 for axis, c, r in zip(self.canvas.grid, blob.centre, blob.radii, strict=True)]
        inside = parts[0] + parts[1] + parts[2] <= 1
        self.mask[inside if within is None else inside & within] = label

    def hounsfield(self, rng: np.random.Generator, noise: float = 12.0) -> np.ndarray:
        """int16 HU [X, Y, Z], RAS+."""
        return with_noise(rng, self.canvas.hu, noise)


class Chest(Grid):
    """A chest with findings, and perhaps lesions."""

    def __init__(
        self, rng: np.random.Generator, anatomy: Anatomy, findings: Mapping[str, Finding], spacing: Triple = SPACING
    ):
        super().__init__(rng, CHEST, spacing)
        self.anatomy = anatomy
        draw_anatomy(self.canvas, anatomy)
        for name, (_, draw) in FINDINGS.items():
            if name in findings:
                draw(self.canvas, anatomy, findings[name])

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


def chest(rng: np.random.Generator, names: Sequence[str] = (), spacing: Triple = SPACING) -> Chest:
    """A random chest with the findings of these names (of `ABNORMALITIES`)."""
    presence = {name: name in names for name in ABNORMALITIES}
    age, sex = int(rng.integers(40, 85)), ("M", "F")[int(rng.integers(2))]
    anatomy = adapt_anatomy(rng, sample_anatomy(rng, age=age, sex=sex), presence)
    findings = {name: FINDINGS[name][0](rng, anatomy) for name in ABNORMALITIES if presence[name]}
    return Chest(rng, anatomy, findings, spacing)


def meta_image(voxels: np.ndarray, affine: np.ndarray, data_file: str = "LOCAL") -> bytes:
    """The header of a MetaImage (`.mhd`) of int16 voxels [X, Y, Z] in RAS+ order, with its voxels behind it where they are
    "LOCAL" (`.mha`). Axes are stored as LPS, the directions of ITK."""
    spacing, origin = np.diag(affine)[:3], affine[:3, 3] * (-1, -1, 1)
    last = spacing * (np.array(voxels.shape) - 1) * (1, 1, 0)
    lines = [
        "ObjectType = Image", "NDims = 3", "BinaryData = True", "BinaryDataByteOrderMSB = False", "CompressedData = False",
        "TransformMatrix = 1 0 0 0 1 0 0 0 1",
        f"Offset = {' '.join(f'{x:g}' for x in origin - last)}",
        "CenterOfRotation = 0 0 0", "AnatomicalOrientation = RAI",
        f"ElementSpacing = {' '.join(f'{x:g}' for x in spacing)}",
        f"DimSize = {' '.join(map(str, voxels.shape))}", "ElementType = MET_SHORT", f"ElementDataFile = {data_file}",
    ]  # fmt: skip
    header = "".join(f"{line}\n" for line in lines).encode()
    return header + (raw_voxels(voxels) if data_file == "LOCAL" else b"")


def raw_voxels(voxels: np.ndarray) -> bytes:
    """int16 voxels [X, Y, Z] in RAS+ order as `meta_image` announces them."""
    return voxels[::-1, ::-1].astype("<i2").tobytes("F")


def png(grey: np.ndarray) -> bytes:
    """An 8-bit picture [rows, columns]."""
    try:
        from PIL import Image
    except ImportError as error:
        raise UserError("pictures of slices need Pillow: pip install pillow") from error
    file = io.BytesIO()
    Image.fromarray(grey).save(file, "PNG")
    return file.getvalue()

"""ACDC, cardiac MR: `training/patient001/` with `Info.cfg`, the 4D file, and two frames with masks."""

from __future__ import annotations

import numpy as np

from mg3d_jax.phantom.canvas import triple
from mg3d_jax.phantom.dataset import nifti_bytes
from mg3d_jax.phantom.finding import Blob
from mg3d_jax.phantom.layouts.base import Files, Layout
from mg3d_jax.phantom.miniature import Grid, stream

GROUPS = ("NOR", "MINF", "DCM", "HCM", "RV")
RIGHT, MYOCARDIUM, LEFT = 1, 2, 3
_FRAMES, _ED, _ES = 6, 1, 4  # frames of the 4D file; end of diastole and of systole, from 1
_SPACING = (4.0, 4.0, 10.0)
_TEST_SHARE = 4


def files(patients: int, seed: int) -> Files:
    """The diagnoses in turn: what they do to the left ventricle's cavity, its wall, its stroke, and the right ventricle."""
    for number in range(1, patients + max(1, patients // _TEST_SHARE) + 1):
        rng = stream("acdc", seed, number)
        group = GROUPS[(number - 1) % len(GROUPS)]
        heart = _heart(rng, group)
        name = f"patient{number:03d}"
        folder = f"{'training' if number <= patients else 'testing'}/{name}"
        cycle = [(1 - np.cos(2 * np.pi * frame / _FRAMES)) / 2 for frame in range(_FRAMES)]
        start = rng.integers(2**31)
        grids = [_draw(np.random.default_rng(start), heart, systole) for systole in cycle]
        stored = [_magnitude(rng, grid) for grid in grids]
        affine = grids[0].affine
        yield f"{folder}/{name}_4d.nii.gz", nifti_bytes(np.stack(stored, -1), affine)
        for frame in (_ED, _ES):
            mask = grids[frame - 1].mask.astype(np.uint8)
            yield f"{folder}/{name}_frame{frame:02d}.nii.gz", nifti_bytes(stored[frame - 1], affine)
            yield f"{folder}/{name}_frame{frame:02d}_gt.nii.gz", nifti_bytes(mask, affine)
        info = {"ED": _ED, "ES": _ES, "Group": group, "Height": 170.0, "NbFrame": _FRAMES, "Weight": 75.0}
        yield f"{folder}/Info.cfg", "".join(f"{key}: {value}\n" for key, value in info.items()).encode()


def _heart(rng: np.random.Generator, group: str) -> dict[str, float]:
    """Radii and thickness in mm at the end of diastole, and the share by which the cavity shortens."""
    cavity, wall, right, stroke = 24.0, 10.0, 24.0, 0.35
    cavity *= {"DCM": 1.5, "HCM": 0.8, "MINF": 1.15}.get(group, 1.0)
    wall *= {"HCM": 1.9, "DCM": 0.75}.get(group, 1.0)
    right *= 1.5 if group == "RV" else 1.0
    stroke *= {"DCM": 0.3, "MINF": 0.45}.get(group, 1.0)
    spread = rng.normal(1, 0.04, 4)
    return {"cavity": cavity * spread[0], "wall": wall * spread[1], "right": right * spread[2], "stroke": stroke}


def _draw(rng: np.random.Generator, heart: dict[str, float], systole: float) -> Grid:
    """One frame; `systole` is 0 at the end of diastole and 1 at that of systole."""
    grid = Grid(rng, (200.0, 200.0, 100.0), _SPACING)
    grid.canvas.hu[:] = 20.0
    shrink = 1 - heart["stroke"] * systole
    cavity, right = heart["cavity"] * shrink, heart["right"] * shrink
    wall = heart["wall"] * (1 + 0.4 * systole)
    grid.canvas.ellipsoid((0.0, 0.0, 0.0), (90.0, 80.0, 140.0), 90.0)  # the chest around it
    blobs = (
        (Blob((wall + cavity + 0.6 * right, 6.0, 0.0), triple((0.8 * right, right, 42.0))), RIGHT, 220.0),
        (Blob((0.0, 0.0, 0.0), triple((cavity + wall, cavity + wall, 46.0))), MYOCARDIUM, 60.0),
        (Blob((0.0, 0.0, 3.0), triple((cavity, cavity, 42.0))), LEFT, 230.0),
    )
    for blob, label, value in blobs:
        grid.canvas.ellipsoid(blob.centre, blob.radii, value)
        grid.mark(blob, label)
    return grid


def _magnitude(rng: np.random.Generator, grid: Grid) -> np.ndarray:
    noisy = grid.canvas.hu + rng.normal(0, 8, grid.canvas.hu.shape)
    return np.clip(np.rint(noisy), 0, 4095).astype(np.int16)


ACDC = Layout("ACDC: cardiac MR with four classes of voxels and five diagnoses, 4D", files, patients=30)

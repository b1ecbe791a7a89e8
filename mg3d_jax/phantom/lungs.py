"""Findings of lungs, airways and pleura, drawn: diffuse patterns, focal lesions, bronchi, effusion."""

from __future__ import annotations

import numpy as np

from mg3d_jax.phantom.anatomy import LOBES, Anatomy, cage_distance, hilum
from mg3d_jax.phantom.canvas import Canvas, power, soft
from mg3d_jax.phantom.finding import (
    Blob,
    Finding,
    blobs_in_lobes,
    choose_lobes,
    choose_side,
    diameters,
    new_seed,
    side_of,
    signs_of,
)


# ---- diffuse patterns of the lung
def _lung_box(canvas: Canvas, a: Anatomy) -> tuple[tuple[slice, ...], tuple[np.ndarray, ...]]:
    return canvas.box((-a.cage[0], -a.cage[1], -128), (a.cage[0], a.cage[1], a.apex))


def sample_emphysema(rng: np.random.Generator, a: Anatomy) -> Finding:
    kind = ("centrilobular", "paraseptal", "panlobular")[int(rng.integers(3))]
    blobs = blobs_in_lobes(rng, a, ("right upper lobe", "left upper lobe"), (2, 3), (13, 22))
    severity = ("moderate", "severe")[int(rng.integers(2))]
    return Finding(
        "Emphysema", "bilateral", ("right upper lobe", "left upper lobe"), (), kind, severity, blobs, new_seed(rng)
    )


def draw_emphysema(canvas: Canvas, a: Anatomy, f: Finding) -> None:
    where, (_, _, z) = _lung_box(canvas, a)
    holes = canvas.smooth_noise(f.seed, 15.0, where)
    holes += np.clip(z / 200, -0.3, 0.3).astype(np.float32)
    canvas.blend(where, np.clip((holes + 0.1) * 6, 0, 1) * canvas.lung[where], -990.0)
    for blob in f.blobs:
        canvas.ellipsoid(blob.centre, blob.radii, -120.0, in_lung=True)
        canvas.ellipsoid(blob.centre, np.array(blob.radii) - 2.0, -1000.0, in_lung=True)


def sample_mosaic(rng: np.random.Generator, a: Anatomy) -> Finding:
    return Finding("Mosaic attenuation pattern", "bilateral", LOBES, seed=new_seed(rng))


def draw_mosaic(canvas: Canvas, a: Anatomy, f: Finding) -> None:
    where, _ = _lung_box(canvas, a)
    patches = np.clip(canvas.smooth_noise(f.seed, 30.0, where) * 10 + 0.5, 0, 1)
    region, lung = canvas.hu[where], canvas.lung[where]
    region += lung * (np.float32(300) * patches - np.float32(110))


def sample_septal(rng: np.random.Generator, a: Anatomy) -> Finding:
    kind = ("smooth", "nodular")[int(rng.integers(2))]
    return Finding("Interlobular septal thickening", "bilateral", LOBES, (), kind, seed=new_seed(rng))


def draw_septal(canvas: Canvas, a: Anatomy, f: Finding) -> None:
    rng = np.random.default_rng(f.seed)
    where, (x, y, z) = _lung_box(canvas, a)
    coverage = np.zeros_like(canvas.hu[where])
    warp = canvas.smooth_noise(f.seed, 36.0, where) * np.float32(0.3)
    turn = rng.uniform(-0.35, 0.35, 3)
    normals = np.eye(3) + np.array([[0, -turn[2], turn[1]], [turn[2], 0, -turn[0]], [-turn[1], turn[0], 0]])
    for normal in (normals / np.linalg.norm(normals, axis=1, keepdims=True)).astype(np.float32):
        phase = (x * normal[0] + y * normal[1] + z * normal[2]) * np.float32(1 / 21.0) + warp
        distance = np.abs(phase - np.round(phase)) * np.float32(21.0)
        np.maximum(coverage, soft(distance - 1.7, canvas.edge), out=coverage)
    canvas.blend(where, coverage * canvas.lung[where], -200.0)


# ---- focal findings of the lung
def sample_atelectasis(rng: np.random.Generator, a: Anatomy) -> Finding:
    side = "right" if a.dome_right > a.dome_left else "left"
    lobe = f"{side} lower lobe"
    sign = 1 if side == "right" else -1
    top = max(a.dome_right, a.dome_left)
    blobs = []
    for step in range(int(rng.integers(2, 4))):
        centre = (
            sign * (0.56 + rng.uniform(-0.08, 0.08)) * a.cage[0],
            float(rng.uniform(-34, -8)),
            top + 14 + 17 * step,
        )
        blobs.append(
            Blob(centre, (float(rng.uniform(36, 46)), float(rng.uniform(32, 44)), float(rng.uniform(4.5, 6.5))))
        )
    kind = ("linear", "subsegmental", "plate-like")[int(rng.integers(3))]
    return Finding("Atelectasis", side, (lobe,), kind=kind, blobs=tuple(blobs))


def draw_atelectasis(canvas: Canvas, a: Anatomy, f: Finding) -> None:
    for blob in f.blobs:
        canvas.ellipsoid(blob.centre, blob.radii, 30.0, in_lung=True)


def sample_nodule(rng: np.random.Generator, a: Anatomy) -> Finding:
    lobes = choose_lobes(rng, 2, 5)
    blobs = blobs_in_lobes(rng, a, lobes, (2, 4), (9.0, 14.0))
    return Finding("Lung nodule", side_of(lobes), lobes, diameters(blobs), blobs=blobs)


def draw_nodule(canvas: Canvas, a: Anatomy, f: Finding) -> None:
    for blob in f.blobs:
        canvas.ellipsoid(blob.centre, blob.radii, 60.0, in_lung=True)
        # A calcified core, as in a granuloma: what tells a nodule from a consolidation once its outline is blurred.
        canvas.ellipsoid(blob.centre, np.array(blob.radii) * 0.65, 450.0, in_lung=True)


def sample_opacity(rng: np.random.Generator, a: Anatomy) -> Finding:
    lobes = choose_lobes(rng, 2, 4)
    return Finding(
        "Lung opacity", side_of(lobes), lobes, blobs=blobs_in_lobes(rng, a, lobes, (1, 2), (24, 36)), seed=new_seed(rng)
    )


def draw_opacity(canvas: Canvas, a: Anatomy, f: Finding) -> None:
    for blob in f.blobs:
        canvas.ellipsoid(blob.centre, blob.radii, -450.0, edge=14.0, in_lung=True, rough=7.0, seed=f.seed)


def sample_consolidation(rng: np.random.Generator, a: Anatomy) -> Finding:
    lobes = choose_lobes(rng, 1, 2)
    blobs = blobs_in_lobes(rng, a, lobes, (1, 1), (28, 40))
    return Finding("Consolidation", side_of(lobes), lobes, diameters(blobs), blobs=blobs, seed=new_seed(rng))


def draw_consolidation(canvas: Canvas, a: Anatomy, f: Finding) -> None:
    for blob in f.blobs:
        canvas.ellipsoid(blob.centre, blob.radii, 35.0, edge=6.0, in_lung=True, rough=10.0, seed=f.seed)
    # Air bronchograms: the airways of the lobe stay open.
    for branch in a.airways:
        if branch.lobe in f.lobes:
            canvas.capsule(branch.start, branch.end, branch.radius, -950.0, in_lung=branch.generation > 0)


def sample_fibrosis(rng: np.random.Generator, a: Anatomy) -> Finding:
    side = choose_side(rng, 0.5)
    lobes = tuple(f"{s} upper lobe" for s in ("right", "left") if side in (s, "bilateral"))
    return Finding("Pulmonary fibrotic sequela", side, lobes, seed=new_seed(rng))


def draw_fibrosis(canvas: Canvas, a: Anatomy, f: Finding) -> None:
    rng = np.random.default_rng(f.seed)
    for sign in signs_of(f.side):
        for _ in range(11):
            start = hilum(sign) + rng.normal(0, 5, 3) + (sign * 14, 0, 34)
            end = np.array(
                [sign * rng.uniform(0.25, 0.8) * a.cage[0], rng.uniform(-0.6, 0.55) * a.cage[1], rng.uniform(72, 104)]
            )
            canvas.capsule(start, end, float(rng.uniform(2.2, 3.6)), 20.0, in_lung=True)
        edge = 0.0 if sign > 0 else -a.cage[0]
        where, (x, y, z) = canvas.box((edge, -a.cage[1], 55), (edge + a.cage[0], a.cage[1], a.apex))
        cap = soft(-cage_distance(a, x, y, z) - 11, canvas.edge) * soft(66 - z, 10.0)
        canvas.blend(where, cap.astype(np.float32) * canvas.lung[where], 30.0)


# ---- airways
def sample_peribronchial(rng: np.random.Generator, a: Anatomy) -> Finding:
    lobes = choose_lobes(rng, 3, 5)
    return Finding(
        "Peribronchial thickening", side_of(lobes), lobes, severity=("moderate", "severe")[int(rng.integers(2))]
    )


def draw_peribronchial(canvas: Canvas, a: Anatomy, f: Finding) -> None:
    chosen = [branch for branch in a.airways if branch.lobe in f.lobes]
    for branch in chosen:
        canvas.capsule(branch.start, branch.end, branch.radius + 6.0, 40.0, in_lung=branch.generation > 0)
    for branch in chosen:
        canvas.capsule(branch.start, branch.end, branch.radius, -950.0, in_lung=branch.generation > 0)


def sample_bronchiectasis(rng: np.random.Generator, a: Anatomy) -> Finding:
    # Lower lobes as a rule, on both sides more often than on one.
    side = choose_side(rng, 0.7)
    lobes = tuple(f"{one} lower lobe" for one in ("right", "left") if side in (one, "bilateral"))
    if side != "left" and rng.random() < 0.6:
        lobes = ("right middle lobe", *lobes)
    kind = ("cylindrical", "varicose", "cystic")[int(rng.integers(3))]
    return Finding("Bronchiectasis", side_of(lobes), lobes, kind=kind, seed=new_seed(rng))


def draw_bronchiectasis(canvas: Canvas, a: Anatomy, f: Finding) -> None:
    rng = np.random.default_rng(f.seed)
    chosen = [branch for branch in a.airways if branch.lobe in f.lobes and branch.generation > 0]
    cysts = [(np.array(b.end) + rng.normal(0, 9, 3), float(rng.uniform(5.5, 7.5))) for b in chosen for _ in range(4)]
    # Thick walls: a thin one and the air within average to the density of lung, and are gone in a 7 mm voxel.
    for branch in chosen:
        canvas.capsule(branch.start, branch.end, 13.0, 60.0, in_lung=True)
    for centre, radius in cysts:
        canvas.ellipsoid(centre, (radius + 5,) * 3, 60.0, in_lung=True)
    for branch in chosen:
        canvas.capsule(branch.start, branch.end, 6.0, -1000.0, in_lung=True)
    for centre, radius in cysts:
        canvas.ellipsoid(centre, (radius,) * 3, -1000.0, in_lung=True)


# ---- pleura
def sample_pleural(rng: np.random.Generator, a: Anatomy) -> Finding:
    side = choose_side(rng, 0.45)
    thickness = float(rng.uniform(32, 58))
    severity = "severe" if thickness > 48 else "moderate"
    return Finding("Pleural effusion", side, sizes_mm=(round(thickness),), severity=severity)


def draw_pleural(canvas: Canvas, a: Anatomy, f: Finding) -> None:
    thickness = f.sizes_mm[0]
    where, (x, y, z) = _lung_box(canvas, a)
    climb = np.clip((55 - z) / 110, 0, 1.15)
    level = -a.cage[1] + thickness * climb * (1 + 0.35 * power(np.abs(x / a.cage[0]), 3))
    keep = np.zeros_like(x)
    for sign in signs_of(f.side):
        keep = np.where(sign * x > 0, 1.0, keep)
    fluid = (soft(y - level, canvas.edge) * keep).astype(np.float32)
    canvas.blend(where, fluid * canvas.lung[where], 10.0)
    canvas.lung[where] *= 1 - fluid

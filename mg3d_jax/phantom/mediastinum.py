"""Findings outside the lungs, drawn: medical material, calcification, heart, esophagus, lymph nodes."""

from __future__ import annotations

import numpy as np

from mg3d_jax.phantom.anatomy import Anatomy, heart_distance
from mg3d_jax.phantom.canvas import Canvas, soft, triple
from mg3d_jax.phantom.finding import Blob, Finding, diameters, new_seed


# ---- medical material, calcification
def sample_material(rng: np.random.Generator, a: Anatomy) -> Finding:
    kind = ("pacemaker", "port catheter", "sternal wires")[int(rng.integers(3))]
    usual, other = ("left", "right") if kind == "pacemaker" else ("right", "left")
    side = "" if kind == "sternal wires" else usual if rng.random() < 0.8 else other
    return Finding("Medical material", side, kind=kind, seed=new_seed(rng))


def draw_material(canvas: Canvas, a: Anatomy, f: Finding) -> None:
    front = a.cage[1]
    cava = ((22.0, 8.0, 96.0), (22.0, 6.0, 10.0))
    heart = np.array(a.heart_centre)
    if f.kind == "sternal wires":
        for z in range(-25, 96, 20):
            for x in (-9, 9):
                canvas.capsule((x, front - 6, z), (x, front + 10, z), 1.8, 3000.0)
            for y in (-6, 10):
                canvas.capsule((-9, front + y, z), (9, front + y, z), 1.8, 3000.0)
        return
    sign = 1 if f.side == "right" else -1
    pocket = np.array([sign * 0.62 * a.cage[0], 0.72 * a.body[1], 78.0])
    if f.kind == "pacemaker":
        canvas.ellipsoid(pocket, (24, 8, 22), 3000.0)
        path = [pocket, (sign * 40, 30, 104), (0, 22, 100), *cava, heart + np.array((-28, 18, -18))]
        radius = 2.2
    else:
        canvas.ellipsoid(pocket, (15, 9, 15), 2600.0)
        path = [pocket, (sign * 40, 30, 106), *cava]
        radius = 2.5
    canvas.tube(np.array([triple(map(float, point)) for point in path]), radius, 2800.0)


def sample_arterial(rng: np.random.Generator, a: Anatomy) -> Finding:
    severity = ("moderate", "severe")[int(rng.integers(2))]
    line = a.aorta()
    blobs = []
    for _ in range(17 if severity == "severe" else 11):
        piece = int(rng.integers(2, len(line) - 1))
        along = rng.uniform(0, 1 if piece < len(line) - 2 else 0.6)
        centre = line[piece] + along * (line[piece + 1] - line[piece])
        outward = rng.normal(size=3)
        direction = (line[piece + 1] - line[piece]) / np.linalg.norm(line[piece + 1] - line[piece])
        outward -= direction * (outward @ direction)
        centre = centre + outward / np.linalg.norm(outward) * a.aorta_radius
        blobs.append(Blob(triple(map(float, centre)), triple(map(float, rng.uniform(4.0, 7.5, 3)))))
    return Finding("Arterial wall calcification", severity=severity, blobs=tuple(blobs))


def sample_coronary(rng: np.random.Generator, a: Anatomy) -> Finding:
    severity = ("moderate", "severe")[int(rng.integers(2))]
    kind = ("left anterior descending artery", "right coronary artery", "all three coronary arteries")[
        int(rng.integers(3))
    ]
    centre, radii = np.array(a.heart_centre), np.array(a.heart_radii)
    blobs = []
    for track in (0, 1) if kind.startswith("all") else (0,) if kind.startswith("left") else (1,):
        for step in np.linspace(0, 1, 9 if severity == "severe" else 7):
            # Down the front of the septum (left anterior descending) or along the right border (right coronary).
            angle = np.array(
                [-0.15 - 0.55 * step, 0.85, 0.55 - 1.1 * step] if track == 0 else [0.75, 0.55, 0.6 - 1.2 * step]
            )
            direction = angle / np.linalg.norm(angle) + rng.normal(0, 0.04, 3)
            # Walk out to the surface of the heart along the direction.
            steps = centre + direction * np.linspace(0, 1.6 * radii.max(), 80)[:, None]
            surface = steps[int(np.argmax(heart_distance(a, *steps.T) > 0))]
            blobs.append(Blob(triple(map(float, surface)), triple(map(float, rng.uniform(4.4, 6.4, 3)))))
    return Finding("Coronary artery wall calcification", kind=kind, severity=severity, blobs=tuple(blobs))


def draw_calcification(canvas: Canvas, a: Anatomy, f: Finding) -> None:
    for blob in f.blobs:
        canvas.ellipsoid(blob.centre, blob.radii, 1500.0)


# ---- heart and mediastinum
def sample_cardiomegaly(rng: np.random.Generator, a: Anatomy) -> Finding:
    ratio = max(a.heart_radii) / a.cage[0]
    return Finding("Cardiomegaly", severity="severe" if ratio > 0.6 else "moderate")


def sample_pericardial(rng: np.random.Generator, a: Anatomy) -> Finding:
    thickness = round(a.pericardial_fluid)
    return Finding("Pericardial effusion", sizes_mm=(thickness,), severity="severe" if thickness > 16 else "moderate")


def draw_nothing(canvas: Canvas, a: Anatomy, f: Finding) -> None:
    """For findings that `adapt_anatomy` has already put into the chest's shape."""


def sample_hernia(rng: np.random.Generator, a: Anatomy) -> Finding:
    size = float(rng.uniform(26, 34))
    centre = (
        float(rng.normal(-9, 4)),
        -0.5 * a.cage[1] + 6,
        min(a.dome_right, a.dome_left) + float(rng.uniform(10, 22)),
    )
    return Finding("Hiatal hernia", sizes_mm=(round(2 * size),), blobs=(Blob(centre, (1.15 * size, 0.8 * size, size)),))


def draw_hernia(canvas: Canvas, a: Anatomy, f: Finding) -> None:
    (blob,) = f.blobs
    centre, radii = np.array(blob.centre), np.array(blob.radii)
    canvas.ellipsoid(centre, radii, 45.0)
    canvas.ellipsoid(centre + radii * (0, 0.22, 0.05), radii * (0.78, 0.6, 0.8), -940.0)
    # The fluid level: the patient lies on the back, so gas is in front.
    where, (x, y, z) = canvas.box(centre - radii, centre + radii)
    rho = np.sqrt(sum(((p - c) / (r * 0.85)) ** 2 for p, c, r in zip((x, y, z), centre, radii, strict=True)))
    level = soft((rho - 1) * radii.min(), canvas.edge) * soft(y - (centre[1] - 0.1 * radii[1]), canvas.edge)
    canvas.blend(where, level.astype(np.float32), 20.0)


# Towards the edge of the mediastinum, so that enlarged nodes bulge into the lung.
_STATIONS = {
    "right paratracheal": (29.0, -4.0, 60.0),
    "left lower paratracheal": (-27.0, -14.0, 62.0),
    "prevascular": (-22.0, 36.0, 48.0),
    "subcarinal": (6.0, -24.0, 8.0),
    "right hilar": (48.0, -4.0, -6.0),
    "left hilar": (-50.0, -4.0, 0.0),
    "aortopulmonary": (-36.0, 8.0, 28.0),
}


def sample_nodes(rng: np.random.Generator, a: Anatomy) -> Finding:
    names = list(_STATIONS)
    chosen = sorted(rng.choice(len(names), int(rng.integers(5, 8)), replace=False))
    blobs = []
    for index in chosen:
        for _ in range(int(rng.integers(1, 3))):
            centre = np.array(_STATIONS[names[index]]) + rng.normal(0, 4, 3)
            blobs.append(Blob(triple(map(float, centre)), triple(map(float, rng.uniform(10, 15, 3)))))
    stations = ", ".join(names[index] for index in chosen[:2])
    return Finding("Lymphadenopathy", kind=stations, sizes_mm=diameters(tuple(blobs)), blobs=tuple(blobs))


def draw_nodes(canvas: Canvas, a: Anatomy, f: Finding) -> None:
    for blob in f.blobs:
        canvas.ellipsoid(blob.centre, blob.radii, 60.0)

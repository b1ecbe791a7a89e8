"""The 18 abnormalities of CT-RATE as they are drawn into a phantom.

Each abnormality is a pair of functions: `sample_*` decides side, lobes, sizes and geometry (once per scan), `draw_*` paints
that geometry (once per reconstruction). They look different from one another by place, density and texture, and are large
enough to survive averaging to 7 mm voxels.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from mg3d_jax.data.abnormalities import ABNORMALITIES
from mg3d_jax.data.phantom_anatomy import (
    LOBES,
    PERICARDIAL_FAT,
    Anatomy,
    cage_distance,
    diaphragm_z,
    heart_distance,
    hilum,
    lobe_of,
    lung_depth,
    mediastinum_half_width,
    place_in_lobe,
)
from mg3d_jax.data.phantom_canvas import Canvas, soft

PREVALENCE: dict[str, float] = {
    "Medical material": 0.25,
    "Arterial wall calcification": 0.3,
    "Cardiomegaly": 0.28,
    "Pericardial effusion": 0.22,
    "Coronary artery wall calcification": 0.3,
    "Hiatal hernia": 0.24,
    "Lymphadenopathy": 0.28,
    "Emphysema": 0.25,
    "Atelectasis": 0.25,
    "Lung nodule": 0.32,
    "Lung opacity": 0.28,
    "Pulmonary fibrotic sequela": 0.25,
    "Pleural effusion": 0.25,
    "Mosaic attenuation pattern": 0.22,
    "Peribronchial thickening": 0.24,
    "Consolidation": 0.25,
    "Bronchiectasis": 0.24,
    "Interlobular septal thickening": 0.22,
}
# What a patient keeps from one scan to the next.
CHRONIC = (
    "Medical material",
    "Arterial wall calcification",
    "Cardiomegaly",
    "Coronary artery wall calcification",
    "Hiatal hernia",
    "Emphysema",
    "Pulmonary fibrotic sequela",
    "Bronchiectasis",
)
HEALTHY_SHARE = 0.04
_AGE_DEPENDENT = ("Arterial wall calcification", "Coronary artery wall calcification")


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


def sample_presence(rng: np.random.Generator, age: int, keep: dict[str, bool] | None = None) -> dict[str, bool]:
    """Which abnormalities a scan has, drawn independently; `keep` are those of the patient's earlier scan."""
    healthy = rng.random() < HEALTHY_SHARE
    draws = rng.random(len(ABNORMALITIES))
    presence = {}
    for name, draw in zip(ABNORMALITIES, draws, strict=True):
        probability = PREVALENCE[name]
        if name in _AGE_DEPENDENT:
            probability *= 0.7 + 0.6 * np.clip((age - 35) / 50, 0, 1)
        presence[name] = bool(draw < probability) and not healthy
    if keep is not None:
        presence |= {name: keep[name] for name in CHRONIC}
    return presence


def adapt_anatomy(rng: np.random.Generator, a: Anatomy, presence: dict[str, bool]) -> Anatomy:
    """The chest whose shape shows the findings that change it: heart size, pericardium, diaphragm."""
    changes: dict[str, object] = {}
    if presence["Cardiomegaly"]:
        factor = rng.uniform(1.28, 1.45)
        x, y, z = a.heart_centre
        changes["heart_radii"] = tuple(float(radius * factor) for radius in a.heart_radii)
        changes["heart_centre"] = (x - 7.0, y + 2.0, z + 6.0)
    if presence["Pericardial effusion"]:
        changes["pericardial_fluid"] = float(rng.uniform(12, 20))
    if presence["Emphysema"]:  # hyperinflation flattens the diaphragm
        changes |= {"dome_right": a.dome_right - 12, "dome_left": a.dome_left - 12, "lung_hu": a.lung_hu - 55}
    if presence["Atelectasis"]:  # the lower lobe loses volume
        dome = "dome_right" if rng.random() < 0.5 else "dome_left"
        changes[dome] = float(changes.get(dome, getattr(a, dome)) + rng.uniform(24, 34))
    return dataclasses.replace(a, **changes)


# ---- helpers of the samplers
def _side(lobes: tuple[str, ...]) -> str:
    sides = {lobe.split()[0] for lobe in lobes}
    return sides.pop() if len(sides) == 1 else "bilateral"


def _choose_lobes(rng: np.random.Generator, low: int, high: int, among: tuple[str, ...] = LOBES) -> tuple[str, ...]:
    count = min(int(rng.integers(low, high + 1)), len(among))
    chosen = rng.choice(len(among), count, replace=False)
    return tuple(among[index] for index in sorted(chosen))


def _seed(rng: np.random.Generator) -> int:
    return int(rng.integers(2**31))


def _choose_side(rng: np.random.Generator, bilateral: float) -> str:
    return "bilateral" if rng.random() < bilateral else ("right", "left")[int(rng.integers(2))]


def _signs(side: str) -> tuple[int, ...]:
    return {"right": (1,), "left": (-1,), "bilateral": (1, -1)}[side]


def _in_lobes(
    rng: np.random.Generator, a: Anatomy, lobes: tuple[str, ...], per_lobe: tuple[int, int], radius: tuple[float, float]
) -> tuple[Blob, ...]:
    """A few blobs in each lobe, `radius` mm (low, high), slightly flattened."""
    blobs = []
    for lobe in lobes:
        for _ in range(int(rng.integers(per_lobe[0], per_lobe[1] + 1))):
            size = float(rng.uniform(*radius))
            centre = place_in_lobe(rng, a, lobe, min(size, 22.0))
            blobs.append(Blob(tuple(map(float, centre)), tuple(float(size * s) for s in rng.uniform(0.85, 1.1, 3))))
    return tuple(blobs)


def _long_axis(blobs: tuple[Blob, ...]) -> tuple[int, ...]:
    return tuple(sorted((round(2 * max(blob.radii)) for blob in blobs), reverse=True))


# ---- medical material, calcification
def sample_material(rng: np.random.Generator, a: Anatomy) -> Finding:
    kind = ("pacemaker", "port catheter", "sternal wires")[int(rng.integers(3))]
    side = {"pacemaker": "left", "port catheter": "right", "sternal wires": ""}[kind]
    return Finding("Medical material", side, kind=kind, seed=_seed(rng))


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
        path = [pocket, (sign * 40, 30, 104), (0, 22, 100), *cava, heart + (-28, 18, -18)]
        radius = 2.2
    else:
        canvas.ellipsoid(pocket, (15, 9, 15), 2600.0)
        path = [pocket, (sign * 40, 30, 106), *cava]
        radius = 2.5
    canvas.tube(np.array([tuple(map(float, point)) for point in path]), radius, 2800.0)


def sample_arterial(rng: np.random.Generator, a: Anatomy) -> Finding:
    severity = ("moderate", "severe")[int(rng.integers(2))]
    line = a.aorta()
    blobs = []
    for _ in range(14 if severity == "severe" else 9):
        piece = int(rng.integers(2, len(line) - 1))
        along = rng.uniform(0, 1 if piece < len(line) - 2 else 0.6)
        centre = line[piece] + along * (line[piece + 1] - line[piece])
        outward = rng.normal(size=3)
        direction = (line[piece + 1] - line[piece]) / np.linalg.norm(line[piece + 1] - line[piece])
        outward -= direction * (outward @ direction)
        centre = centre + outward / np.linalg.norm(outward) * a.aorta_radius
        blobs.append(Blob(tuple(map(float, centre)), tuple(map(float, rng.uniform(3.5, 6.5, 3)))))
    return Finding("Arterial wall calcification", severity=severity, blobs=tuple(blobs))


def sample_coronary(rng: np.random.Generator, a: Anatomy) -> Finding:
    severity = ("moderate", "severe")[int(rng.integers(2))]
    kind = ("left anterior descending artery", "right coronary artery", "all three coronary arteries")[int(rng.integers(3))]
    centre, radii = np.array(a.heart_centre), np.array(a.heart_radii)
    blobs = []
    for track in ((0, 1) if kind.startswith("all") else (0,) if kind.startswith("left") else (1,)):
        for step in np.linspace(0, 1, 8 if severity == "severe" else 6):
            # Down the front of the septum (left anterior descending) or along the right border (right coronary).
            angle = np.array([-0.15 - 0.55 * step, 0.85, 0.55 - 1.1 * step] if track == 0 else [0.75, 0.55, 0.6 - 1.2 * step])
            direction = angle / np.linalg.norm(angle) + rng.normal(0, 0.04, 3)
            # Walk out to the surface of the heart along the direction.
            steps = centre + direction * np.linspace(0, 1.6 * radii.max(), 80)[:, None]
            surface = steps[int(np.argmax(heart_distance(a, *steps.T) > 0))]
            blobs.append(Blob(tuple(map(float, surface)), tuple(map(float, rng.uniform(3.2, 5.0, 3)))))
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
    size = float(rng.uniform(23, 31))
    centre = (float(rng.normal(-9, 4)), -0.5 * a.cage[1] + 6, min(a.dome_right, a.dome_left) + float(rng.uniform(10, 22)))
    return Finding("Hiatal hernia", sizes_mm=(round(2 * size),), blobs=(Blob(centre, (1.15 * size, 0.8 * size, size)),))


def draw_hernia(canvas: Canvas, a: Anatomy, f: Finding) -> None:
    (blob,) = f.blobs
    centre, radii = np.array(blob.centre), np.array(blob.radii)
    canvas.ellipsoid(centre, radii, 45.0)
    canvas.ellipsoid(centre + (0, 0.22 * radii[1], 0.05 * radii[2]), radii * (0.78, 0.6, 0.8), -940.0)
    # The fluid level: the patient lies on the back, so gas is in front.
    where, (x, y, z) = canvas.box(centre - radii, centre + radii)
    rho = np.sqrt(sum(((p - c) / (r * 0.85)) ** 2 for p, c, r in zip((x, y, z), centre, radii, strict=True)))
    level = soft((rho - 1) * radii.min(), canvas.edge) * soft(y - (centre[1] - 0.1 * radii[1]), canvas.edge)
    canvas.blend(where, level.astype(np.float32), 20.0)


_STATIONS = {
    "right paratracheal": (20.0, -4.0, 62.0),
    "left lower paratracheal": (-17.0, -4.0, 46.0),
    "prevascular": (-4.0, 42.0, 52.0),
    "subcarinal": (3.0, -24.0, 10.0),
    "right hilar": (42.0, -2.0, -4.0),
    "left hilar": (-44.0, -2.0, 2.0),
    "aortopulmonary": (-30.0, 12.0, 30.0),
}


def sample_nodes(rng: np.random.Generator, a: Anatomy) -> Finding:
    names = list(_STATIONS)
    chosen = sorted(rng.choice(len(names), int(rng.integers(4, 7)), replace=False))
    blobs = []
    for index in chosen:
        for _ in range(int(rng.integers(1, 3))):
            centre = np.array(_STATIONS[names[index]]) + rng.normal(0, 4, 3)
            blobs.append(Blob(tuple(map(float, centre)), tuple(map(float, rng.uniform(9, 14, 3)))))
    stations = ", ".join(names[index] for index in chosen[:2])
    return Finding("Lymphadenopathy", kind=stations, sizes_mm=_long_axis(tuple(blobs)), blobs=tuple(blobs))


def draw_nodes(canvas: Canvas, a: Anatomy, f: Finding) -> None:
    for blob in f.blobs:
        canvas.ellipsoid(blob.centre, blob.radii, 60.0)


# ---- diffuse patterns of the lung
def _lung_box(canvas: Canvas, a: Anatomy) -> tuple[tuple[slice, ...], tuple[np.ndarray, ...]]:
    return canvas.box((-a.cage[0], -a.cage[1], -128), (a.cage[0], a.cage[1], a.apex))


def sample_emphysema(rng: np.random.Generator, a: Anatomy) -> Finding:
    kind = ("centrilobular", "paraseptal", "panlobular")[int(rng.integers(3))]
    blobs = _in_lobes(rng, a, ("right upper lobe", "left upper lobe"), (2, 3), (13, 22))
    severity = ("moderate", "severe")[int(rng.integers(2))]
    return Finding("Emphysema", "bilateral", ("right upper lobe", "left upper lobe"), (), kind, severity, blobs, _seed(rng))


def draw_emphysema(canvas: Canvas, a: Anatomy, f: Finding) -> None:
    where, (_, _, z) = _lung_box(canvas, a)
    holes = canvas.smooth_noise(f.seed, 15.0, where)
    holes += np.clip(z / 200, -0.3, 0.3).astype(np.float32)
    canvas.blend(where, np.clip((holes - 0.05) * 6, 0, 1) * canvas.lung[where], -990.0)
    for blob in f.blobs:
        canvas.ellipsoid(blob.centre, blob.radii, -120.0, in_lung=True)
        canvas.ellipsoid(blob.centre, np.array(blob.radii) - 2.0, -1000.0, in_lung=True)


def sample_mosaic(rng: np.random.Generator, a: Anatomy) -> Finding:
    return Finding("Mosaic attenuation pattern", "bilateral", LOBES, seed=_seed(rng))


def draw_mosaic(canvas: Canvas, a: Anatomy, f: Finding) -> None:
    where, _ = _lung_box(canvas, a)
    patches = np.clip(canvas.smooth_noise(f.seed, 30.0, where) * 10 + 0.5, 0, 1)
    region, lung = canvas.hu[where], canvas.lung[where]
    region += lung * (np.float32(260) * patches - np.float32(90))


def sample_septal(rng: np.random.Generator, a: Anatomy) -> Finding:
    kind = ("smooth", "nodular")[int(rng.integers(2))]
    return Finding("Interlobular septal thickening", "bilateral", LOBES, (), kind, seed=_seed(rng))


def draw_septal(canvas: Canvas, a: Anatomy, f: Finding) -> None:
    rng = np.random.default_rng(f.seed)
    where, (x, y, z) = _lung_box(canvas, a)
    coverage = np.zeros_like(canvas.hu[where])
    turn = rng.uniform(-0.35, 0.35, 3)
    normals = np.eye(3) + np.array([[0, -turn[2], turn[1]], [turn[2], 0, -turn[0]], [-turn[1], turn[0], 0]])
    for normal in (normals / np.linalg.norm(normals, axis=1, keepdims=True)).astype(np.float32):
        phase = (x * normal[0] + y * normal[1] + z * normal[2]) * np.float32(1 / 21.0)
        distance = np.abs(phase - np.round(phase)) * np.float32(21.0)
        np.maximum(coverage, soft(distance - 2.0, canvas.edge), out=coverage)
    canvas.blend(where, coverage * canvas.lung[where], -60.0)


# ---- focal findings of the lung
def sample_atelectasis(rng: np.random.Generator, a: Anatomy) -> Finding:
    side = "right" if a.dome_right > a.dome_left else "left"
    lobe = f"{side} lower lobe"
    sign = 1 if side == "right" else -1
    top = max(a.dome_right, a.dome_left)
    blobs = []
    for step in range(int(rng.integers(2, 4))):
        centre = (sign * (0.56 + rng.uniform(-0.08, 0.08)) * a.cage[0], float(rng.uniform(-34, -8)), top + 14 + 17 * step)
        blobs.append(Blob(centre, (float(rng.uniform(36, 46)), float(rng.uniform(32, 44)), float(rng.uniform(4.5, 6.5)))))
    kind = ("linear", "subsegmental", "plate-like")[int(rng.integers(3))]
    return Finding("Atelectasis", side, (lobe,), kind=kind, blobs=tuple(blobs))


def draw_atelectasis(canvas: Canvas, a: Anatomy, f: Finding) -> None:
    for blob in f.blobs:
        canvas.ellipsoid(blob.centre, blob.radii, 30.0, in_lung=True)


def sample_nodule(rng: np.random.Generator, a: Anatomy) -> Finding:
    lobes = _choose_lobes(rng, 2, 4)
    blobs = _in_lobes(rng, a, lobes, (1, 3), (8.0, 15.0))
    return Finding("Lung nodule", _side(lobes), lobes, _long_axis(blobs), blobs=blobs)


def draw_nodule(canvas: Canvas, a: Anatomy, f: Finding) -> None:
    for blob in f.blobs:
        canvas.ellipsoid(blob.centre, blob.radii, 60.0, in_lung=True)


def sample_opacity(rng: np.random.Generator, a: Anatomy) -> Finding:
    lobes = _choose_lobes(rng, 2, 4)
    return Finding("Lung opacity", _side(lobes), lobes, blobs=_in_lobes(rng, a, lobes, (1, 2), (24, 36)), seed=_seed(rng))


def draw_opacity(canvas: Canvas, a: Anatomy, f: Finding) -> None:
    for blob in f.blobs:
        canvas.ellipsoid(blob.centre, blob.radii, -450.0, edge=14.0, in_lung=True)


def sample_consolidation(rng: np.random.Generator, a: Anatomy) -> Finding:
    lobes = _choose_lobes(rng, 1, 2)
    blobs = _in_lobes(rng, a, lobes, (1, 1), (28, 40))
    return Finding("Consolidation", _side(lobes), lobes, _long_axis(blobs), blobs=blobs, seed=_seed(rng))


def draw_consolidation(canvas: Canvas, a: Anatomy, f: Finding) -> None:
    for blob in f.blobs:
        canvas.ellipsoid(blob.centre, blob.radii, 35.0, edge=6.0, in_lung=True)
    # Air bronchograms: the airways of the lobe stay open.
    for branch in a.airways:
        if branch.lobe in f.lobes:
            canvas.capsule(branch.start, branch.end, branch.radius, -950.0)


def sample_fibrosis(rng: np.random.Generator, a: Anatomy) -> Finding:
    side = _choose_side(rng, 0.5)
    lobes = tuple(f"{s} upper lobe" for s in ("right", "left") if side in (s, "bilateral"))
    return Finding("Pulmonary fibrotic sequela", side, lobes, seed=_seed(rng))


def draw_fibrosis(canvas: Canvas, a: Anatomy, f: Finding) -> None:
    rng = np.random.default_rng(f.seed)
    for sign in _signs(f.side):
        for _ in range(11):
            start = hilum(sign) + rng.normal(0, 5, 3) + (sign * 14, 0, 34)
            end = np.array([sign * rng.uniform(0.25, 0.8) * a.cage[0], rng.uniform(-0.6, 0.55) * a.cage[1], rng.uniform(72, 104)])
            canvas.capsule(start, end, float(rng.uniform(2.2, 3.6)), 20.0, in_lung=True)
        edge = 0.0 if sign > 0 else -a.cage[0]
        where, (x, y, z) = canvas.box((edge, -a.cage[1], 55), (edge + a.cage[0], a.cage[1], a.apex))
        cap = soft(-cage_distance(a, x, y, z) - 11, canvas.edge) * soft(66 - z, 10.0)
        canvas.blend(where, cap.astype(np.float32) * canvas.lung[where], 30.0)


# ---- airways
def sample_peribronchial(rng: np.random.Generator, a: Anatomy) -> Finding:
    lobes = _choose_lobes(rng, 3, 5)
    return Finding("Peribronchial thickening", _side(lobes), lobes, severity=("moderate", "severe")[int(rng.integers(2))])


def draw_peribronchial(canvas: Canvas, a: Anatomy, f: Finding) -> None:
    chosen = [branch for branch in a.airways if branch.lobe in f.lobes and branch.generation < 2]
    for branch in chosen:
        canvas.capsule(branch.start, branch.end, branch.radius + 6.5, 40.0)
    for branch in chosen:
        canvas.capsule(branch.start, branch.end, branch.radius, -950.0)


def sample_bronchiectasis(rng: np.random.Generator, a: Anatomy) -> Finding:
    lobes = _choose_lobes(rng, 1, 2, ("right middle lobe", "right lower lobe", "left lower lobe"))
    kind = ("cylindrical", "varicose", "cystic")[int(rng.integers(3))]
    return Finding("Bronchiectasis", _side(lobes), lobes, kind=kind, seed=_seed(rng))


def draw_bronchiectasis(canvas: Canvas, a: Anatomy, f: Finding) -> None:
    rng = np.random.default_rng(f.seed)
    chosen = [branch for branch in a.airways if branch.lobe in f.lobes and branch.generation > 0]
    cysts = [(np.array(b.end) + rng.normal(0, 9, 3), float(rng.uniform(8, 11))) for b in chosen for _ in range(3)]
    for branch in chosen:
        canvas.capsule(branch.start, branch.end, 9.5, 40.0)
    for centre, radius in cysts:
        canvas.ellipsoid(centre, (radius + 3,) * 3, 40.0, in_lung=True)
    for branch in chosen:
        canvas.capsule(branch.start, branch.end, 6.5, -1000.0)
    for centre, radius in cysts:
        canvas.ellipsoid(centre, (radius,) * 3, -1000.0)


# ---- pleura
def sample_pleural(rng: np.random.Generator, a: Anatomy) -> Finding:
    side = _choose_side(rng, 0.45)
    thickness = float(rng.uniform(32, 58))
    severity = "severe" if thickness > 48 else "moderate"
    return Finding("Pleural effusion", side, sizes_mm=(round(thickness),), severity=severity)


def draw_pleural(canvas: Canvas, a: Anatomy, f: Finding) -> None:
    thickness = f.sizes_mm[0]
    where, (x, y, z) = _lung_box(canvas, a)
    climb = np.clip((55 - z) / 110, 0, 1.15)
    level = -a.cage[1] + thickness * climb * (1 + 0.35 * np.abs(x / a.cage[0]) ** 3)
    keep = np.zeros_like(x)
    for sign in _signs(f.side):
        keep = np.where(sign * x > 0, 1.0, keep)
    fluid = (soft(y - level, canvas.edge) * keep).astype(np.float32)
    canvas.blend(where, fluid * canvas.lung[where], 10.0)
    canvas.lung[where] *= 1 - fluid


Sampler = Callable[[np.random.Generator, Anatomy], Finding]
Drawer = Callable[[Canvas, Anatomy, Finding], None]

# In the order of drawing: what changes the whole lung first, what lies on top of everything last.
FINDINGS: dict[str, tuple[Sampler, Drawer]] = {
    "Emphysema": (sample_emphysema, draw_emphysema),
    "Mosaic attenuation pattern": (sample_mosaic, draw_mosaic),
    "Interlobular septal thickening": (sample_septal, draw_septal),
    "Lung opacity": (sample_opacity, draw_opacity),
    "Pulmonary fibrotic sequela": (sample_fibrosis, draw_fibrosis),
    "Consolidation": (sample_consolidation, draw_consolidation),
    "Peribronchial thickening": (sample_peribronchial, draw_peribronchial),
    "Bronchiectasis": (sample_bronchiectasis, draw_bronchiectasis),
    "Atelectasis": (sample_atelectasis, draw_atelectasis),
    "Lung nodule": (sample_nodule, draw_nodule),
    "Pleural effusion": (sample_pleural, draw_pleural),
    "Cardiomegaly": (sample_cardiomegaly, draw_nothing),
    "Pericardial effusion": (sample_pericardial, draw_nothing),
    "Hiatal hernia": (sample_hernia, draw_hernia),
    "Lymphadenopathy": (sample_nodes, draw_nodes),
    "Arterial wall calcification": (sample_arterial, draw_calcification),
    "Coronary artery wall calcification": (sample_coronary, draw_calcification),
    "Medical material": (sample_material, draw_material),
}

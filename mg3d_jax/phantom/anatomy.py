"""A procedural chest: trunk, rib cage, lungs with lobes, airways and vessels, heart, great vessels, spine, abdomen.

Coordinates are mm in RAS+ order around the middle of the chest: x to the patient's right, y anterior, z superior.
Surfaces are implicit functions that broadcast, so the same function serves a whole grid and a list of points.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mg3d_jax.phantom.canvas import Canvas, power, soft, triple

LOBES = ("right upper lobe", "right middle lobe", "right lower lobe", "left upper lobe", "left lower lobe")
FLOOR_Z = -128.0  # the deepest costophrenic recess
FAT_HU, MUSCLE_HU, BONE_HU = -95.0, 50.0, 420.0

# Where the segmental airways of each lobe end: x, y as shares of the cage's half width and depth, z in mm.
_SEGMENT_ENDS = {
    "right upper lobe": ((0.66, 0.3, 62), (0.6, -0.35, 74), (0.42, 0.05, 92)),
    "right middle lobe": ((0.55, 0.72, -18), (0.8, 0.42, -22)),
    "right lower lobe": ((0.72, -0.4, -52), (0.52, -0.72, -34), (0.82, 0.02, -58)),
    "left upper lobe": ((-0.66, 0.3, 62), (-0.58, -0.3, 72), (-0.74, 0.55, 6)),
    "left lower lobe": ((-0.72, -0.4, -52), (-0.52, -0.72, -34), (-0.84, 0.0, -58)),
}


@dataclass(frozen=True)
class Branch:
    """One straight piece of an airway: ends [3] in mm, inner radius in mm, generation (0 lobar, 1 and 2 segmental)."""

    lobe: str
    generation: int
    start: tuple[float, float, float]
    end: tuple[float, float, float]
    radius: float


@dataclass(frozen=True)
class Anatomy:
    """The numbers of one scan's chest (mm and HU) from which everything is drawn."""

    age: int
    sex: str
    body: tuple[float, float]  # half width and half depth of the trunk
    fat: float  # thickness under the skin
    cage: tuple[float, float]  # half width and half depth of the pleural cavity
    apex: float  # z of the lungs' top
    dome_right: float  # z of the diaphragm's domes
    dome_left: float
    mediastinum: float  # half width
    heart_centre: tuple[float, float, float]
    heart_radii: tuple[float, float, float]  # long axis, transverse, vertical
    pericardial_fluid: float  # thickness
    aorta_radius: float
    lung_hu: float
    blood_hu: float
    airways: tuple[Branch, ...]
    twigs: tuple[Branch, ...]  # small vessels beyond the last airways; radius is the vessel's
    table: bool  # whether the patient table is in the field of view
    texture_seed: int

    def aorta(self) -> np.ndarray:
        """Centre line [n, 3] of the thoracic aorta: ascending, arch, descending."""
        _, y, z = self.heart_centre
        descending = -0.56 * self.cage[1]
        top = 56.0
        arc = np.linspace(0, np.pi, 9)
        arch = np.stack(
            [-2 - 14 * (1 - np.cos(arc)) + 14, (descending + 16) / 2 + (16 - descending) / 2 * np.cos(arc)], 1
        )
        arch = np.concatenate([arch, (top - 20 + 22 * np.sin(arc))[:, None]], 1)
        return np.array(
            [(2.0, y + 2, z + 24), (14.0, 14.0, 8.0), *arch, (-20.0, descending, -40.0), (-8.0, descending, -170.0)]
        )


def sample_anatomy(rng: np.random.Generator, *, age: int, sex: str) -> Anatomy:
    """A chest without findings; `sex` "M" or "F" shifts its size."""
    size = float(rng.normal(1.0 if sex == "M" else 0.94, 0.03))
    fat = float(rng.uniform(8, 22))
    cage = (118 * size + rng.normal(0, 3), 77 * size + rng.normal(0, 3))
    dome = float(rng.normal(-62, 5))
    scale = float(np.clip(rng.normal(0.92, 0.035), 0.84, 1.0)) * size
    airways = _sample_airways(rng, cage)
    return Anatomy(
        age=age,
        sex=sex,
        body=(cage[0] + fat + 22, cage[1] + fat + 18),
        fat=fat,
        cage=cage,
        apex=float(rng.normal(116, 4)),
        dome_right=float(dome + 4),
        dome_left=float(dome - 5),
        mediastinum=float(rng.normal(29, 1.5)),
        heart_centre=(float(rng.normal(-17, 3)), float(rng.normal(16, 3)), float(dome + 22)),
        heart_radii=(54 * scale, 40 * scale, 42 * scale),
        pericardial_fluid=0.0,
        aorta_radius=float(rng.normal(12.5, 1.0)),
        lung_hu=float(rng.normal(-805, 15)),
        blood_hu=float(rng.choice([45.0, 120.0], p=[0.75, 0.25]) + rng.normal(0, 6)),
        airways=airways,
        twigs=_sample_twigs(rng, airways),
        table=bool(rng.random() < 0.6),
        texture_seed=int(rng.integers(2**31)),
    )


def hilum(side: int) -> np.ndarray:
    """Centre [3] of the right (+1) or left (-1) hilum."""
    return np.array([36.0 * side, -10.0, 6.0 if side > 0 else 12.0])


def _sample_airways(rng: np.random.Generator, cage: tuple[float, float]) -> tuple[Branch, ...]:
    branches = []
    for lobe, shares in _SEGMENT_ENDS.items():
        root = hilum(1 if lobe.startswith("right") else -1)
        ends = np.array([(x * cage[0], y * cage[1], z) for x, y, z in shares]) + rng.normal(0, 4, (len(shares), 3))
        fork = root + 0.38 * (ends.mean(0) - root)
        branches.append(Branch(lobe, 0, triple(root), triple(fork), 4.0))
        for end in ends:
            middle = fork + 0.55 * (end - fork) + rng.normal(0, 3, 3)
            branches.append(Branch(lobe, 1, triple(fork), triple(middle), 2.6))
            branches.append(Branch(lobe, 2, triple(middle), triple(end), 1.6))
    return tuple(branches)


def _sample_twigs(rng: np.random.Generator, airways: tuple[Branch, ...]) -> tuple[Branch, ...]:
    twigs = []
    for branch in airways:
        if branch.generation == 2:
            start, end = np.array(branch.start), np.array(branch.end)
            for _ in range(4):
                root = start + rng.uniform(0.2, 1.0) * (end - start)
                tip = root + 0.5 * (end - start) + rng.normal(0, 16, 3)
                twigs.append(Branch(branch.lobe, 3, triple(root), triple(tip), float(rng.uniform(1.1, 1.7))))
    return tuple(twigs)


def superellipse(x: np.ndarray, y: np.ndarray, exponent: float) -> np.ndarray:
    """Distance from the centre, 1 on the curve; `x` and `y` in units of its half axes."""
    return power(power(np.abs(x), exponent) + power(np.abs(y), exponent), 1 / exponent)


# Surfaces: signed distances in mm (approximate), negative inside unless said otherwise.
def cage_distance(a: Anatomy, x: np.ndarray, y: np.ndarray, z: np.ndarray) -> np.ndarray:
    """To the inner face of the rib cage, which narrows towards the apices."""
    rho = superellipse(x / a.cage[0], y / a.cage[1], 2.4)
    climb = np.clip((z + 40) / (a.apex + 40), 0, 1)
    return (rho - np.sqrt(1 - power(climb, 2.7))) * np.float32(a.cage[1])


def diaphragm_z(a: Anatomy, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Height of the diaphragm at (x, y)."""
    lateral = (np.abs(x) / a.cage[0] - 0.5) / 0.5
    dome = np.where(x > 0, a.dome_right, a.dome_left) - 30 * lateral**2
    return np.maximum(dome - 42 * np.square((y - 12) / a.cage[1]), FLOOR_Z).astype(np.float32)


def mediastinum_half_width(a: Anatomy, y: np.ndarray, z: np.ndarray) -> np.ndarray:
    """Half width of the mediastinum at (y, z): narrow in front, wide at the spine."""
    depth = np.interp(y / a.cage[1], [-1.1, -0.6, 0.0, 0.5, 1.0], [1.1, 1.0, 1.0, 0.9, 0.45])
    height = np.interp(z, [-120.0, -20.0, 50.0, 110.0], [0.95, 0.95, 1.05, 0.85])
    return (a.mediastinum * depth * height).astype(np.float32)


def heart_distance(a: Anatomy, x: np.ndarray, y: np.ndarray, z: np.ndarray) -> np.ndarray:
    """To the heart's surface; its long axis points to the left, forward and down."""
    x, y, z = x - a.heart_centre[0], y - a.heart_centre[1], z - a.heart_centre[2]
    # Rows: long axis, transverse, vertical; orthonormal.
    along = np.float32(-0.76) * x + np.float32(0.46) * y - np.float32(0.46) * z
    across = np.float32(0.52) * x + np.float32(0.854) * y
    up = np.float32(-0.393) * x + np.float32(0.239) * y + np.float32(0.888) * z
    rho2 = (along / a.heart_radii[0]) ** 2 + (across / a.heart_radii[1]) ** 2 + (up / a.heart_radii[2]) ** 2
    return (np.sqrt(rho2) - 1) * np.float32(sum(a.heart_radii) / 3)


PERICARDIAL_FAT = 5.0


def lung_depth(a: Anatomy, points: np.ndarray) -> np.ndarray:
    """How deep in aerated lung points [n, 3] lie, mm; negative outside."""
    x, y, z = np.moveaxis(np.asarray(points, np.float64), -1, 0)
    pericardium = heart_distance(a, x, y, z) - PERICARDIAL_FAT - a.pericardial_fluid
    return np.minimum.reduce(
        [-cage_distance(a, x, y, z), np.abs(x) - mediastinum_half_width(a, y, z), z - diaphragm_z(a, x, y), pericardium]
    )


def lobe_of(point: np.ndarray) -> str:
    """The lobe that a point [3] of the lungs belongs to, by planes for the fissures."""
    x, y, z = point
    lower = z < 5 - 0.9 * y
    if x <= 0:
        return "left lower lobe" if lower else "left upper lobe"
    if lower:
        return "right lower lobe"
    return "right upper lobe" if z > 5 else "right middle lobe"


def place_in_lobe(rng: np.random.Generator, a: Anatomy, lobe: str, margin: float) -> np.ndarray:
    """A random point [3] of `lobe`, if it can be `margin` mm inside the lung (else the deepest of the points tried)."""
    side = 1 if lobe.startswith("right") else -1
    low = np.array([25.0, -a.cage[1], FLOOR_Z])
    high = np.array([a.cage[0], a.cage[1], a.apex])
    points = rng.uniform(low, high, (200, 3)) * (side, 1, 1)
    points = points[[lobe_of(point) == lobe for point in points]]
    depth = lung_depth(a, points)
    deep = np.flatnonzero(depth >= margin)
    return points[deep[0] if deep.size else int(np.argmax(depth))]


# Drawing
def draw_anatomy(canvas: Canvas, a: Anatomy) -> None:
    """Paints the healthy chest and leaves the share of aerated lung in `canvas.lung`."""
    _draw_trunk(canvas, a)
    _draw_lungs(canvas, a)
    _draw_bones(canvas, a)
    _draw_lung_trees(canvas, a)
    _draw_heart(canvas, a)
    _draw_great_vessels(canvas, a)


def _draw_trunk(canvas: Canvas, a: Anatomy) -> None:
    x, y, z = canvas.grid
    edge, everywhere = canvas.edge, (slice(None),) * 3
    shoulders = 1 - 0.45 * np.square(np.clip((z - 105) / 55, 0, 1))
    rho = superellipse(x / a.body[0], y / a.body[1], 2.6)
    skin = (rho - shoulders) * np.float32(a.body[1])
    if a.table:
        where, (_, across, _) = canvas.box((-190, -a.body[1] - 16, -220), (190, -a.body[1] - 8, 220))
        canvas.blend(where, soft(np.abs(across + a.body[1] + 12) - 3, edge), -100.0)
    canvas.blend(everywhere, soft(skin, edge), FAT_HU)
    canvas.blend(everywhere, soft(skin + a.fat, edge), MUSCLE_HU)
    if a.sex == "F":
        for side in (-1, 1):
            canvas.ellipsoid((side * 0.52 * a.body[0], a.body[1] - 12, -5), (52, 26, 48), FAT_HU)
    low, high = (-a.cage[0], -a.cage[1], -220.0), (a.cage[0], a.cage[1], a.apex)
    where, (x, y, z) = canvas.box(low, high)
    inside = soft(cage_distance(a, x, y, z), edge)
    canvas.blend(where, inside, FAT_HU)
    # Upper abdomen: liver to the right, spleen and stomach to the left, in fat.
    below = inside * soft(z - diaphragm_z(a, x, y) + 3, edge)
    canvas.blend(where, below * soft(-25 - x + 0.15 * z, 8), 58.0)
    left, front = -0.45 * a.cage[0], 0.2 * a.cage[1]
    spleen = a.dome_left - 42
    canvas.ellipsoid((-0.68 * a.cage[0], -0.4 * a.cage[1], spleen), (26, 30, 36), 52.0)
    canvas.ellipsoid((left, front, spleen - 6), (36, 34, 34), 30.0)
    canvas.ellipsoid((left, front + 14, spleen), (18, 12, 16), -900.0)


def _draw_lungs(canvas: Canvas, a: Anatomy) -> None:
    edge = canvas.edge
    where, (x, y, z) = canvas.box((-a.cage[0], -a.cage[1], FLOOR_Z), (a.cage[0], a.cage[1], a.apex))
    lung = soft(cage_distance(a, x, y, z), edge)
    lung *= soft(mediastinum_half_width(a, y, z) - np.abs(x), edge)
    lung *= soft(diaphragm_z(a, x, y) - z, edge)
    around = a.pericardial_fluid + PERICARDIAL_FAT
    lung *= soft(around - heart_distance(a, x, y, z), edge)
    canvas.lung[where] = lung
    # Supine: the back is a little denser than the front.
    texture = a.lung_hu - (0.3 * y).astype(np.float32) + 14 * canvas.smooth_noise(a.texture_seed, 18.0, where)
    canvas.blend(where, lung, texture)


def _draw_bones(canvas: Canvas, a: Anatomy) -> None:
    cx, cy = a.cage
    where, (x, y, z) = canvas.box((-cx - 12, -cy - 12, -220), (cx + 12, cy + 12, a.apex + 6))
    shell = cage_distance(a, x, y, z)
    phase = np.abs((z - 0.45 * y) / 25.0 % 1.0 - 0.5) * 25.0  # ribs slope down towards the front
    canvas.blend(where, soft(np.abs(shell - 5) - 3.5, canvas.edge) * soft(phase - 4.5, canvas.edge), BONE_HU)
    spine_y = -0.84 * cy
    where, (x, y, z) = canvas.box((-20, spine_y - 20, -220), (20, spine_y + 20, 220))
    body = soft(np.sqrt(x**2 + (y - spine_y) ** 2) - 17, canvas.edge)
    disc = soft(np.abs((z + 11) / 26.0 % 1.0 - 0.5) * 26.0 - 2.5, canvas.edge)
    canvas.blend(where, body, 230 - 150 * disc)
    canvas.capsule((0, spine_y - 24, -220), (0, spine_y - 24, 220), 8.0, 20.0)
    for side in (-1, 1):
        canvas.capsule((side * 13, spine_y - 24, -220), (side * 13, spine_y - 24, 220), 4.0, BONE_HU)
        canvas.capsule((side * 14, 0.75 * cy, a.apex - 6), (side * 0.85 * cx, 0.15 * cy, a.apex + 16), 5.5, BONE_HU)
    canvas.capsule((0, spine_y - 38, -220), (0, spine_y - 38, 220), 3.0, BONE_HU)
    canvas.ellipsoid((0, cy + 2, 35), (16, 5, 70), 260.0)  # sternum


def _draw_lung_trees(canvas: Canvas, a: Anatomy) -> None:
    for branch in a.airways:
        start, end = np.array(branch.start), np.array(branch.end)
        # Artery and vein run beside the airway, on its outer and inner side.
        for offset, radius in ((6.0, branch.radius * 1.15), (-7.0, branch.radius * 0.95)):
            shift = np.array([0.0, offset * 0.4, offset])
            canvas.capsule(start + shift, end + shift, radius, a.blood_hu, in_lung=True)
        canvas.airway(start, end, branch.radius, 1.0, -150.0, in_lung=branch.generation > 0)
    for twig in a.twigs:
        canvas.capsule(twig.start, twig.end, twig.radius, a.blood_hu, in_lung=True)
    trachea_top = np.array([0.0, -8.0, 200.0])
    carina = np.array([0.0, -8.0, 28.0])
    canvas.capsule(trachea_top, carina, 10.0, 20.0)
    for side in (-1, 1):
        canvas.airway(carina, hilum(side), 6.0, 1.5, 20.0, in_lung=False)
    canvas.capsule(trachea_top, carina, 8.5, -990.0)


def _draw_heart(canvas: Canvas, a: Anatomy) -> None:
    around = a.pericardial_fluid + PERICARDIAL_FAT
    reach = max(a.heart_radii) + around + 6
    centre = np.array(a.heart_centre)
    where, (x, y, z) = canvas.box(centre - reach, centre + reach)
    distance = heart_distance(a, x, y, z)
    inside_chest = soft(cage_distance(a, x, y, z) + 1, canvas.edge)
    canvas.blend(where, soft(distance - around, canvas.edge) * inside_chest, 12.0 if a.pericardial_fluid else FAT_HU)
    canvas.blend(where, soft(distance - PERICARDIAL_FAT, canvas.edge) * inside_chest, FAT_HU)
    canvas.blend(where, soft(distance, canvas.edge) * inside_chest, 0.4 * a.blood_hu + 30)
    canvas.ellipsoid(centre + 2, np.array(a.heart_radii) * (0.55, 0.5, 0.6), a.blood_hu)


def _draw_great_vessels(canvas: Canvas, a: Anatomy) -> None:
    canvas.tube(a.aorta(), a.aorta_radius, a.blood_hu)
    canvas.tube(np.array([(22.0, 8.0, 100.0), (22.0, 6.0, 0.0), (20.0, 0.0, a.heart_centre[2] + 10)]), 8.0, a.blood_hu)
    trunk = np.array([(-18.0, 26.0, a.heart_centre[2] + 30), (-14.0, 18.0, 20.0)])
    canvas.tube(trunk, 11.0, a.blood_hu)
    for side in (-1, 1):
        canvas.capsule(trunk[1], hilum(side) + np.array((0, 8, 4)), 8.0, a.blood_hu)
    esophagus_y = -0.5 * a.cage[1]
    canvas.capsule((4, esophagus_y + 10, 110), (4, esophagus_y, -110), 6.0, 35.0)

"""A grid of Hounsfield units in millimetre coordinates, and the few shapes that phantoms are drawn with.

Every shape is drawn only inside its bounding box and with an edge about one voxel wide, so that a structure thinner
than a voxel still has the right mean (the partial volume effect) and two reconstructions of one scan agree at any
spacing. Nothing here calls BLAS, and powers are `power`'s: the result must depend neither on the number of threads nor on the
processor.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable

import numpy as np

Triple = tuple[float, float, float]
Point = np.ndarray | Triple
ROOM_AIR_HU = -1000.0


def triple(values: Iterable[float]) -> Triple:
    """Three numbers as a tuple, as they are."""
    x, y, z = values
    return x, y, z


def soft(distance: np.ndarray, edge: float) -> np.ndarray:
    """Coverage in [0, 1] of a signed distance in mm (negative inside), with a ramp `edge` mm wide."""
    return np.clip(np.float32(0.5) - distance * np.float32(1.0 / edge), 0.0, 1.0)


def power(base: np.ndarray, exponent: float) -> np.ndarray:
    """`base ** exponent`, both of float32. The last digit of NumPy's own depends on whether the processor has AVX-512."""
    return np.power(base, np.float32(exponent), dtype=np.float64).astype(np.float32)


class Canvas:
    """HU on a grid: `hu` [X, Y, Z] float32 at voxel centres `x`, `y`, `z` (mm, ascending; RAS+ axes).

    `lung` [X, Y, Z] is the share of aerated lung in each voxel; findings of the lung are drawn through it.
    """

    def __init__(self, x: np.ndarray, y: np.ndarray, z: np.ndarray):
        self.axes = tuple(np.asarray(axis, np.float32) for axis in (x, y, z))
        self.spacing = tuple(float(axis[1] - axis[0]) for axis in self.axes)
        self.edge = float(np.mean(self.spacing))
        self.hu = np.full([len(axis) for axis in self.axes], ROOM_AIR_HU, np.float32)
        self.lung = np.zeros_like(self.hu)

    @property
    def grid(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Coordinates that broadcast to the grid: [X, 1, 1], [1, Y, 1], [1, 1, Z], mm."""
        x, y, z = self.axes
        return x[:, None, None], y[None, :, None], z[None, None, :]

    def box(self, low: Point, high: Point) -> tuple[tuple[slice, ...], tuple[np.ndarray, ...]]:
        """Slices of the voxels between two corners (mm, one voxel wider), and their broadcastable coordinates."""
        slices = []
        for axis, lo, hi, step in zip(self.axes, low, high, self.spacing, strict=True):
            start, stop = np.searchsorted(axis, (lo - step, hi + step))
            slices.append(slice(int(start), int(stop)))
        sx, sy, sz = slices
        x, y, z = self.axes
        return (sx, sy, sz), (x[sx, None, None], y[None, sy, None], z[None, None, sz])

    def blend(self, where: tuple[slice, ...], coverage: np.ndarray, value: float | np.ndarray) -> None:
        """Moves `hu[where]` towards `value` by `coverage`, in place."""
        region = self.hu[where]
        region += coverage * (value - region)

    def _through(self, where: tuple[slice, ...], coverage: np.ndarray, in_lung: bool) -> np.ndarray:
        return coverage * self.lung[where] if in_lung else coverage

    def ellipsoid(
        self,
        centre: Point,
        radii: Point,
        value: float,
        *,
        edge: float = 0.0,
        in_lung: bool = False,
        rough: float = 0.0,
        seed: int = 0,
    ) -> None:
        """Fills an axis-aligned ellipsoid (mm).

        `edge` widens its rim, `in_lung` keeps it to aerated lung, `rough` (mm) and `seed` make its outline irregular.
        """
        centre, radii = np.asarray(centre, np.float32), np.asarray(radii, np.float32)
        edge = max(edge, self.edge)
        reach = edge + 2 * rough
        where, (x, y, z) = self.box(centre - radii - reach, centre + radii + reach)
        rho = ((x - centre[0]) / radii[0]) ** 2 + ((y - centre[1]) / radii[1]) ** 2 + ((z - centre[2]) / radii[2]) ** 2
        distance = (np.sqrt(rho) - 1) * radii.min()
        if rough:
            distance += np.float32(rough) * self.smooth_noise(seed, 14.0, where)
        coverage = soft(distance, edge)
        self.blend(where, self._through(where, coverage, in_lung), value)

    def capsule_distance(self, start: Point, end: Point, reach: float) -> tuple[tuple[slice, ...], np.ndarray]:
        """Distance in mm to the segment from `start` to `end`, in a box that reaches `reach` mm around it."""
        start, end = np.asarray(start, np.float32), np.asarray(end, np.float32)
        where, (x, y, z) = self.box(np.minimum(start, end) - reach, np.maximum(start, end) + reach)
        x, y, z = x - start[0], y - start[1], z - start[2]
        axis = end - start
        length2 = float((axis**2).sum())
        along = (x * axis[0] + y * axis[1] + z * axis[2]) * np.float32(1 / max(length2, 1e-6))
        np.clip(along, 0.0, 1.0, out=along)
        distance = (x - along * axis[0]) ** 2
        distance += (y - along * axis[1]) ** 2
        distance += (z - along * axis[2]) ** 2
        return where, np.sqrt(distance, out=distance)

    def capsule(self, start: Point, end: Point, radius: float, value: float, *, in_lung: bool = False) -> None:
        """Fills a rod with round ends, `radius` mm thick."""
        # A rod thinner than a voxel is drawn one voxel thick and fainter by the ratio of areas: its mass stays right.
        drawn = max(radius, self.edge / 2)
        where, distance = self.capsule_distance(start, end, drawn + self.edge)
        coverage = soft(distance - drawn, self.edge) * np.float32((radius / drawn) ** 2)
        self.blend(where, self._through(where, coverage, in_lung), value)

    def tube(self, points: np.ndarray, radius: float, value: float) -> None:
        """Fills a polyline [n, 3] of rods."""
        for start, end in itertools.pairwise(points):
            self.capsule(start, end, radius, value)

    def airway(self, start: Point, end: Point, lumen: float, wall: float, wall_hu: float, *, in_lung: bool) -> None:
        """Draws a wall `wall` mm thick around an air-filled lumen of radius `lumen` mm."""
        self.capsule(start, end, lumen + wall, wall_hu, in_lung=in_lung)
        self.capsule(start, end, lumen, -980.0, in_lung=in_lung)

    def smooth_noise(self, seed: int, cell: float, where: tuple[slice, ...]) -> np.ndarray:
        """A smooth random field of mean 0 and variance about 1/3: a normal lattice `cell` mm wide, interpolated.

        Over the voxels `where`. It depends on the seed and the place in mm only, not on the grid.
        """
        half = 220.0
        count = int(2 * half / cell) + 2
        field = np.random.default_rng(seed).standard_normal((count,) * 3, np.float32)
        for dimension in (2, 1, 0):
            position = np.clip((self.axes[dimension][where[dimension]] + half) / cell, 0, count - 1.001)
            index = position.astype(np.intp)
            shape = [1, 1, 1]
            shape[dimension] = -1
            fraction = (position - index).astype(np.float32).reshape(shape)
            low = np.take(field, index, axis=dimension)
            field = low + fraction * (np.take(field, index + 1, axis=dimension) - low)
        return field

"""Constants around a scan: what a mask, a rotation or a scanner wrote where there was nothing to measure becomes air.

A constant counts as padding where it touches the border of the volume and stands out: many voxels of the border have exactly
this number, and few have one beside it, which measured air, fat or tissue with its noise never shows. Voxels inside that
happen to have the same number stay as they are.
"""

from __future__ import annotations

import numpy as np

from mg3d_jax.batch import AIR_HU

_LEAST_SHARE = 0.003  # of the voxels on the border
_LEAST_VOXELS = 30
_STANDS_OUT = 8  # times as many as of any of the four numbers beside it
_MOST_CONSTANTS = 3
_IS_AIR = -950.0  # HU: a constant below is air already
_BELOW_AIR = -1500.0  # HU: noise of 100 HU and more does not make air so dark
_LEAST_LOW = 20  # voxels of a sample
_CUT_SHARE = 0.005  # voxels at the very lowest or highest number: a window was cut out


def border_constants(sample: np.ndarray) -> list[float]:
    """The constants on the faces of a regular 3D sample of a volume, in stored numbers, the commonest first."""
    if sample.ndim != 3 or min(sample.shape) < 3:
        return []
    faces = np.concatenate([np.moveaxis(sample, axis, 0)[end].ravel() for axis in range(3) for end in (0, -1)])
    faces = faces[np.isfinite(faces)] if faces.dtype.kind == "f" else faces
    values, counts = np.unique(faces, return_counts=True)
    beside = np.zeros(len(values), counts.dtype)
    for step in (1, 2):
        beside[step:] = np.maximum(beside[step:], counts[:-step])
        beside[:-step] = np.maximum(beside[:-step], counts[step:])
    found = np.flatnonzero((counts >= max(_LEAST_SHARE * faces.size, _LEAST_VOXELS)) & (counts > _STANDS_OUT * beside))
    return [float(values[i]) for i in found[np.argsort(-counts[found])][:_MOST_CONSTANTS]]


def without_constants(sample: np.ndarray, constants: list[float]) -> np.ndarray:
    """The numbers of a sample that say what the tissue is. The lowest number stays where as many lie just above it: that is
    air which was cut off, not padding."""
    kept = sample
    for constant in constants:
        low, high = float(sample.min()), float(sample.max())
        just_above = (sample > constant) & (sample < constant + 0.15 * (high - low))
        if constant == low and np.count_nonzero(just_above) > 0.3 * np.count_nonzero(sample == constant):
            continue
        left = kept[kept != constant]
        if left.size > 0.02 * sample.size:
            kept = left
    return kept


def cut_off(sample: np.ndarray, slope: float, intercept: float) -> list[str]:
    """Warnings where HU end within what a body has: darker or brighter voxels all have the same number."""
    said = []
    for end, name, within in ((sample.min(), "below", 1), (sample.max(), "above", -1)):
        hu = float(end) * slope + intercept
        if (hu > -900 if within > 0 else hu < 1000) and np.mean(sample == end) > _CUT_SHARE:
            said.append(f"HU are cut off {name} {hu:g}: what lay beyond is lost")
    return said


def below_air(sample: np.ndarray, slope: float, intercept: float, constants: list[float]) -> list[str]:
    """Warnings where numbers in the body are far below air: dense things whose numbers were too large for the type. What
    reaches three faces of the volume lies around the body.

    sample: a regular 3D sample of stored numbers."""
    from scipy import ndimage

    low = (sample * slope + intercept < _BELOW_AIR) & ~np.isin(sample, constants)
    if np.count_nonzero(low) < _LEAST_LOW:
        return []
    labels, count = ndimage.label(low)
    faces = np.zeros(count + 1, int)
    for axis in range(3):
        for end in (0, -1):
            faces[np.unique(np.moveaxis(labels, axis, 0)[end])] += 1
    inside = int(np.count_nonzero((faces < 3)[labels] & low))
    if inside < _LEAST_LOW:
        return []
    share = inside / sample.size
    return [
        f"{share:.2%} of the voxels lie in the body and below {_BELOW_AIR:g} HU: bone or metal whose numbers ran over?"
    ]


def fill_padding(
    data: np.ndarray, constants: list[float], slope: float, intercept: float, warnings: list[str]
) -> np.ndarray:
    """Writes air over the padding, in place where the type can hold it; returns the data.

    data: [i, j, k] stored numbers, of which slices along k are whole planes. A constant that is air already is left."""
    for constant in constants:
        hu = constant * slope + intercept
        if hu <= _IS_AIR:
            continue
        data, filled = _fill(data, constant, (AIR_HU - intercept) / slope)
        if filled:
            warnings.append(
                f"padding: {filled / data.size:.1%} of the voxels are {constant:g} ({hu:g} HU) up to the border of the "
                "volume: taken for air"
            )
    return data


def not_finite(data: np.ndarray) -> tuple[int, int]:
    """How many voxels are NaN or infinite up to the border of the volume, and how many inside."""
    outside = inside = 0
    for k in range(data.shape[2]):
        bad = ~np.isfinite(data[:, :, k])
        if bad.any():
            padding = int(np.count_nonzero(up_to_the_border(bad)))
            outside, inside = outside + padding, inside + int(np.count_nonzero(bad)) - padding
    return outside, inside


def up_to_the_border(plane: np.ndarray) -> np.ndarray:
    """The parts of a mask [i, j] that hang together with the plane's border."""
    from scipy import ndimage

    labels, count = ndimage.label(plane)
    touches = np.zeros(count + 1, bool)
    for edge in (labels[0], labels[-1], labels[:, 0], labels[:, -1]):
        touches[edge] = True
    touches[0] = False
    return touches[labels]


def _fill(data: np.ndarray, constant: float, air: float) -> tuple[np.ndarray, int]:
    """(data, how many voxels were filled), plane by plane."""
    if data.dtype.kind in "iu":
        air = round(air)
        if not np.iinfo(data.dtype).min <= air <= np.iinfo(data.dtype).max:
            data = data.astype(np.int32, order="K")
    filled = 0
    for k in range(data.shape[2]):
        same = data[:, :, k] == constant
        if same.any():
            padding = up_to_the_border(same)
            data[:, :, k][padding] = air
            filled += int(np.count_nonzero(padding))
    return data, filled

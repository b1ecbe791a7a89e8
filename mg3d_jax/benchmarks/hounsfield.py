"""`mg3d bench hounsfield`: what the reader makes of CT whose numbers are stored, and described, in every way met in public.

Each base (a scan in true HU) is stored in each way; the answer is "right" (HU as they were), "refused", "said" (other HU, with
a warning) or "wrong" (other HU in silence, which must not happen). Bases are drawn here; `--ct FILE` adds a CT of your own,
whole, cropped, and with noise. A right answer may carry a warning too; those are counted.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from mg3d_jax.errors import UserError
from mg3d_jax.files import write_json
from mg3d_jax.prepare.geometry import Metadata
from mg3d_jax.prepare.nifti import StoredVolume, VolumeError, read_nifti
from mg3d_jax.prepare.volumes import in_hounsfield, to_hounsfield
from mg3d_jax.progress import track

Scaling = tuple[float, float] | None
ANSWERS = ("right", "refused", "said", "wrong")
_TOLERANCE_HU = 2.0
_RAW, _SIEMENS = (1.0, -1024.0), (1.0, -8192.0)


def _whole(hu: np.ndarray, dtype: type) -> np.ndarray:
    info = np.iinfo(dtype)
    return np.clip(np.rint(hu), info.min, info.max).astype(dtype)


def _shifted(shift: float, dtype: type = np.int16) -> Callable[[np.ndarray], np.ndarray]:
    return lambda hu: _whole(hu + shift, dtype)


def _scaled(scale: float, shift: float = 0.0) -> Callable[[np.ndarray], np.ndarray]:
    return lambda hu: _whole((hu + shift) * scale, np.int16)


def _background(value: float) -> Callable[[np.ndarray], np.ndarray]:
    """Outside of an ellipse in the plane the number is `value`, as masks, rotations and scanners leave it."""

    def store(hu: np.ndarray) -> np.ndarray:
        x, y = np.meshgrid(*(np.linspace(-1, 1, n) for n in hu.shape[:2]), indexing="ij")
        return _whole(np.where((x**2 + y**2 > 1.0)[..., None], value, hu), np.int16)

    return store


# name: (stored numbers of true HU, scaling in the header, scaling in the metadata table)
WAYS: dict[str, tuple[Callable[[np.ndarray], np.ndarray], Scaling, Scaling]] = {
    "HU": (_shifted(0), None, None),
    "HU, int32": (_shifted(0, np.int32), None, None),
    "HU, float32": (lambda hu: hu.astype(np.float32), None, None),
    "raw, header": (_shifted(1024, np.uint16), _RAW, None),
    "raw, table": (_shifted(1024), None, _RAW),
    "raw, both": (_shifted(1024), _RAW, _RAW),
    "raw, none": (_shifted(1024, np.uint16), None, None),
    "raw, header -8192, table": (_shifted(1024), _SIEMENS, _RAW),
    "+8192, header": (_shifted(8192), _SIEMENS, None),
    "+8192, table": (_shifted(8192), None, _SIEMENS),
    "+1000, header": (_shifted(1000), (1.0, -1000.0), None),
    "+1000, table": (_shifted(1000), None, (1.0, -1000.0)),
    "+1000, none": (_shifted(1000), None, None),
    "twice, header": (_scaled(2, 1024), (0.5, -1024.0), None),
    "HU, header -1024": (_shifted(0), _RAW, None),
    "HU, table -1024": (_shifted(0), None, _RAW),
    "HU, table -8192": (_shifted(0), None, _SIEMENS),
    "HU, both -8192": (_shifted(0), _SIEMENS, _SIEMENS),
    "HU - 1024, table": (_shifted(-1024), None, _RAW),
    "HU - 8192": (_shifted(-8192), None, None),
    "HU + 100": (_shifted(100), None, None),
    "HU + 200": (_shifted(200), None, None),
    "HU - 150": (_shifted(-150), None, None),
    "HU - 300": (_shifted(-300), None, None),
    "raw + 100, header": (_shifted(1124), _RAW, None),
    "raw + 200, table": (_shifted(1224), None, _RAW),
    "negated": (_scaled(-1), None, None),
    "half": (_scaled(0.5), None, None),
    "0.8": (_scaled(0.8), None, None),
    "double": (_scaled(2), None, None),
    "0 outside": (_background(0), None, None),
    "40 outside": (_background(40), None, None),
    "-3024 outside": (_background(-3024), None, None),
    "3071 outside": (_background(3071), None, None),
    "0 outside, table -1024": (_background(0), None, _RAW),
    "window -160 to 240": (lambda hu: _whole(np.clip(hu, -160, 240), np.int16), None, None),
    "window -1000 to 400": (lambda hu: _whole(np.clip(hu, -1000, 400), np.int16), None, None),
}


def trunk(shape: tuple[int, int, int] = (96, 80, 48), *, lungs: bool = True, contrast: float = 0.0) -> np.ndarray:
    """float HU [x, y, z] of a chest, or an abdomen without lungs; `contrast`: HU by which blood and organs are enhanced."""
    x, y, z = np.meshgrid(*(np.linspace(-1, 1, n) for n in shape), indexing="ij")
    hu = np.full(shape, -1000.0)
    hu[(x / 0.9) ** 2 + (y / 0.82) ** 2 < 1] = -100
    hu[(x / 0.78) ** 2 + (y / 0.66) ** 2 < 1] = 55
    if lungs:
        for side, width in ((-1, 0.3), (1, 0.24)):
            hu[((x - side * 0.38) / width) ** 2 + (y / 0.5) ** 2 + (z / 0.95) ** 2 < 1] = -860
    else:
        hu[((x + 0.35) / 0.35) ** 2 + (y / 0.45) ** 2 < 1] = 60 + contrast / 3  # liver
        hu[(x / 0.4) ** 2 + ((y + 0.35) / 0.2) ** 2 < 1] = -105  # fat between the bowels
        hu[((x - 0.3) / 0.1) ** 2 + ((y + 0.3) / 0.1) ** 2 + (z / 0.4) ** 2 < 1] = -950  # gas
    hu[((x - 0.05) / 0.16) ** 2 + ((y + 0.1) / 0.2) ** 2 < 1] = 40 + contrast
    hu[(x / 0.12) ** 2 + ((y - 0.5) / 0.12) ** 2 < 1] = 180
    hu[(np.abs((x / 0.78) ** 2 + (y / 0.66) ** 2 - 0.97) < 0.03) & (np.sin(20 * z) > 0.6)] = 500  # ribs
    return hu


def head(shape: tuple[int, int, int] = (80, 96, 48)) -> np.ndarray:
    """float HU [x, y, z] of a head: scalp, skull, brain, ventricles."""
    x, y, z = np.meshgrid(*(np.linspace(-1, 1, n) for n in shape), indexing="ij")
    hu = np.full(shape, -1000.0)
    for size, value in ((0.92, -90), (0.88, 45), (0.85, 900), (0.76, 36)):
        hu[(x / size) ** 2 + (y / size) ** 2 + (z / 1.4) ** 2 < 1] = value
    hu[(x / 0.15) ** 2 + (y / 0.3) ** 2 + (z / 0.4) ** 2 < 1] = 8
    return hu


def noisy(hu: np.ndarray, noise: float, seed: int = 0) -> np.ndarray:
    """As a scanner stores it: whole numbers, with noise of that many HU, cut off at -1024."""
    return np.clip(np.rint(hu + np.random.default_rng(seed).normal(0, noise, hu.shape)), -1024, 3071)


def bases(files: list[Path]) -> dict[str, np.ndarray]:
    """True HU by name: drawn ones, and those of CT files whose numbers are HU."""
    chest, abdomen = trunk(), trunk(lungs=False, contrast=0)
    found = {f"chest, noise {n}": noisy(chest, n) for n in (10, 40, 80, 100)}
    found |= {f"abdomen, noise {n}": noisy(abdomen, n) for n in (10, 40, 100)}
    found |= {"abdomen, contrast": noisy(trunk(lungs=False, contrast=150), 15)}
    found |= {"chest, contrast": noisy(trunk(contrast=250), 15)}
    found |= {f"head, noise {n}": noisy(head(), n) for n in (5, 40, 100)}
    found |= {f"lungs only, noise {n}": noisy(chest[14:80, 22:58], n) for n in (15, 100)}
    found |= {f"no air, noise {n}": noisy(abdomen[20:76, 20:64], n) for n in (15, 60)}
    for file in files:
        hu = np.asarray(read_nifti(file).data, np.float64)
        x, y, z = (np.array([0.25, 0.75]) * n for n in hu.shape)
        part = tuple(slice(int(a), int(b)) for a, b in (x, y, z))
        for name, one in {file.name.split(".")[0]: hu, f"{file.name.split('.')[0]}, middle": hu[part]}.items():
            found |= {f"{name}, noise {n}": noisy(one, n) if n else np.clip(one, -1024, 3071) for n in (0, 40, 100)}
    return found


SMALL_SHIFTS = (*range(-100, 0, 10), *range(10, 101, 10))  # HU
SMALL_SCALES = (0.6, 0.67, 0.75, 0.8, 0.85, 0.9, 0.95, 1.05, 1.1, 1.15, 1.2, 1.25, 1.33, 1.5)


def silent(hu: np.ndarray) -> tuple[list[int], list[float]]:
    """Of `SMALL_SHIFTS` and `SMALL_SCALES`, those that the reader takes without a word."""
    shifts = [
        by for by in SMALL_SHIFTS if _answer(hu, (_shifted(by), None, None), np.zeros(hu.shape, bool))[0] == "wrong"
    ]
    scales = [
        by for by in SMALL_SCALES if _answer(hu, (_scaled(by), None, None), np.zeros(hu.shape, bool))[0] == "wrong"
    ]
    return shifts, scales


def answer(hu: np.ndarray, way: str) -> tuple[str, list[str]]:
    """One of `ANSWERS`, and the warnings. True HU outside of what the way keeps count as lost, not as right."""
    return _answer(hu, WAYS[way], _lost(hu, way))


def _answer(
    hu: np.ndarray, way: tuple[Callable[[np.ndarray], np.ndarray], Scaling, Scaling], lost: np.ndarray
) -> tuple[str, list[str]]:
    store, header, table = way
    stored = StoredVolume(np.asfortranarray(store(hu)), np.eye(4), header, has_orientation=True)
    warnings: list[str] = []
    try:
        data, mapping = in_hounsfield(stored, Metadata(scaling=table), warnings)
    except VolumeError as error:
        return "refused", [str(error)]
    got = to_hounsfield(mapping)(data)
    expected = np.clip(np.where(lost, -1024, hu), -1024, 3071)
    off = np.mean(np.abs(got - expected) > _TOLERANCE_HU)
    if off < 0.002:
        return "right", warnings
    return ("said" if warnings else "wrong"), warnings


def _lost(hu: np.ndarray, way: str) -> np.ndarray:
    """Voxels that a background overwrote: air is the right answer there."""
    if "outside" not in way:
        return np.zeros(hu.shape, bool)
    return _background(-30_000)(hu) == -30_000


def measure(found: dict[str, np.ndarray]) -> dict[str, dict[str, tuple[str, list[str]]]]:
    """Base -> way -> (answer, warnings)."""
    return {
        name: {way: answer(hu, way) for way in WAYS} for name, hu in track(list(found.items()), "bases", len(found))
    }


def _print(found: dict[str, dict[str, tuple[str, list[str]]]]) -> None:
    by_way = {way: [row[way] for row in found.values()] for way in WAYS}
    by_base = {base: list(row.values()) for base, row in found.items()}
    console = Console(width=140)
    for name, rows in (("stored", by_way), ("base", by_base)):
        table = Table(name, *ANSWERS, "right with a warning", title=f"{len(found)} bases in {len(WAYS)} ways")
        for label, answers in rows.items():
            counts = Counter(what for what, _ in answers)
            warned = sum(what == "right" and bool(warnings) for what, warnings in answers)
            table.add_row(label, *(str(counts[what] or "") for what in ANSWERS), str(warned or ""))
        console.print(table)


def _span(values: Sequence[float]) -> str:
    """The smallest and the largest, "none" where there are none."""
    return f"{min(values):+g} to {max(values):+g}" if values else "none"


def main(argv: list[str]) -> int:
    """The command; 1 where one answer is wrong in silence."""
    parser = argparse.ArgumentParser(prog="mg3d bench hounsfield", description=__doc__.split("\n")[0])
    parser.add_argument("--ct", type=Path, nargs="+", default=[], help="NIfTI files whose stored numbers are HU")
    parser.add_argument("--limits", action="store_true", help="instead: which small shifts and scales are not noticed")
    parser.add_argument("--json", type=Path, help="write every answer with its warnings to this file")
    args = parser.parse_args(argv)
    if missing := [path for path in args.ct if not path.is_file()]:
        raise UserError(f"--ct {missing[0]}: there is no such file")
    if args.limits:
        for name, hu in bases(args.ct).items():
            shifts, scales = silent(hu)
            print(f"{name:28} shifts {_span(shifts):16} scales {_span(scales)}", flush=True)
        return 0
    found = measure(bases(args.ct))
    _print(found)
    if args.json:
        write_json(args.json, found)
    wrong = [f"{base}, stored as {way}" for base, row in found.items() for way, (a, _) in row.items() if a == "wrong"]
    print(f"{sum(map(len, found.values()))} answers, {len(wrong)} wrong in silence", *wrong, sep="\n  ")
    return 1 if wrong else 0

"""LUNA16: `subset0/` to `subset9/` of `.mhd` and `.raw`, `candidates_V2.csv`, `annotations.csv`."""

from __future__ import annotations

import numpy as np

from mg3d_jax.phantom.anatomy import LOBES, place_in_lobe
from mg3d_jax.phantom.layouts.base import Files, Layout, csv_bytes
from mg3d_jax.phantom.miniature import chest, meta_image, raw_voxels, stream

_SPACING = (5.0, 5.0, 5.0)
_OTHERS = 4  # candidates that are no nodule, per nodule
_APART = 40.0  # mm between those and a nodule, at least


def files(patients: int, seed: int) -> Files:
    """A series has one to three nodules of 14 to 26 mm; what is no nodule is a place of the lung without one."""
    candidates: list[dict[str, str]] = []
    annotations: list[dict[str, str]] = []
    for number in range(patients):
        rng = stream("luna16", seed, number)
        series = f"1.3.6.1.4.1.14519.5.2.1.6279.6001.{100000 + number}"
        scan = chest(rng, spacing=_SPACING)
        blobs = [scan.lesion(rng, (7.0, 13.0), 90.0) for _ in range(int(rng.integers(1, 4)))]
        places = np.array([blob.centre for blob in blobs])
        for blob in blobs:
            row = {"seriesuid": series} | _lps(np.array(blob.centre))
            annotations.append(row | {"diameter_mm": f"{2 * np.mean(blob.radii):.3f}"})
            candidates.append(
                {"seriesuid": series} | _lps(np.array(blob.centre) + rng.normal(0, 1.5, 3)) | {"class": "1"}
            )
        wanted = len(candidates) + _OTHERS * len(blobs)
        for _ in range(100 * _OTHERS):
            place = place_in_lobe(rng, scan.anatomy, LOBES[int(rng.integers(len(LOBES)))], 12.0)
            if len(candidates) == wanted:
                break
            if np.linalg.norm(places - place, axis=1).min() > _APART:
                candidates.append({"seriesuid": series} | _lps(place) | {"class": "0"})
        hu, folder = scan.hounsfield(rng), f"subset{number % 10}"
        yield f"{folder}/{series}.mhd", meta_image(hu, scan.affine, f"{series}.raw")
        yield f"{folder}/{series}.raw", raw_voxels(hu)
    yield "candidates_V2.csv", csv_bytes(candidates)
    yield "annotations.csv", csv_bytes(annotations)


def _lps(place: np.ndarray) -> dict[str, str]:
    x, y, z = place
    return {"coordX": f"{-x:.4f}", "coordY": f"{-y:.4f}", "coordZ": f"{z:.4f}"}


LUNA16 = Layout("LUNA16: lung nodules and other candidates, MetaImage", files)

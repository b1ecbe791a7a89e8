"""The Medical Segmentation Decathlon: `dataset.json`, `imagesTr/`, `labelsTr/`, `imagesTs/` (no labels)."""

from __future__ import annotations

import json
from collections.abc import Callable

import numpy as np

from mg3d_jax.phantom.anatomy import FAT_HU
from mg3d_jax.phantom.canvas import triple
from mg3d_jax.phantom.dataset import nifti_bytes
from mg3d_jax.phantom.finding import Blob
from mg3d_jax.phantom.layouts.base import Files, Layout
from mg3d_jax.phantom.miniature import SPACING, Grid, chest, stream

_TEST_SHARE = 5  # one unlabelled test case for so many labelled ones


def _dataset_json(name: str, label: str, prefix: str, patients: int, tests: int) -> bytes:
    numbers, hidden = range(1, patients + 1), range(patients + 1, patients + tests + 1)
    return json.dumps(
        {
            "name": name,
            "description": "MG-3D phantom: procedural scans, no patients",
            "tensorImageSize": "3D",
            "modality": {"0": "CT"},
            "labels": {"0": "background", "1": label},
            "numTraining": patients,
            "numTest": tests,
            "training": [
                {"image": f"./imagesTr/{prefix}_{n:03d}.nii.gz", "label": f"./labelsTr/{prefix}_{n:03d}.nii.gz"}
                for n in numbers
            ],
            "test": [f"./imagesTs/{prefix}_{n:03d}.nii.gz" for n in hidden],
        },
        indent=1,
    ).encode()


def _task(
    name: str, label: str, prefix: str, draw: Callable[[np.random.Generator], Grid]
) -> Callable[[int, int], Files]:
    """`files` of a task: `draw` makes a case with its mask."""

    def files(patients: int, seed: int) -> Files:
        tests = max(1, patients // _TEST_SHARE)
        yield "dataset.json", _dataset_json(name, label, prefix, patients, tests)
        for number in range(1, patients + tests + 1):
            rng = stream(f"msd-{prefix}", seed, number)
            scan = draw(rng)
            image = nifti_bytes(scan.hounsfield(rng), scan.affine)
            if number > patients:
                yield f"imagesTs/{prefix}_{number:03d}.nii.gz", image
            else:
                yield f"imagesTr/{prefix}_{number:03d}.nii.gz", image
                yield f"labelsTr/{prefix}_{number:03d}.nii.gz", nifti_bytes(scan.mask.astype(np.uint8), scan.affine)

    return files


def _lung(rng: np.random.Generator) -> Grid:
    """A chest with one or two dense tumours in the lungs."""
    scan = chest(rng)
    for _ in range(int(rng.integers(1, 3))):
        scan.lesion(rng, (16.0, 30.0), 70.0)
    return scan


def _colon(rng: np.random.Generator) -> Grid:
    """An abdomen: trunk, spine, liver, a frame of colon with gas in it, and a tumour on its wall."""
    scan = Grid(rng, (320.0, 240.0, 280.0), SPACING)
    canvas, size = scan.canvas, float(rng.normal(1.0, 0.05))
    canvas.ellipsoid((0, 0, 0), (150 * size, 105 * size, 400), FAT_HU)
    canvas.ellipsoid((0, 0, 0), (128 * size, 85 * size, 400), 45.0)
    canvas.ellipsoid((0, 5, 0), (112 * size, 66 * size, 380), FAT_HU)
    canvas.ellipsoid((62 * size, 10, 90), (46, 48, 50), 60.0)  # liver
    canvas.capsule((0, -62 * size, -200), (0, -62 * size, 200), 17.0, 230.0)  # spine
    corners = np.array(
        [(75, -15, -80), (80, 0, 20), (0, 30, 40), (-80, 0, 45), (-78, -15, -60), (-20, -5, -110)], float
    )
    frame = corners * size + rng.normal(0, 5, corners.shape)
    canvas.tube(frame, 18.0, 40.0)
    canvas.tube(frame, 11.0, -960.0)
    part = int(rng.integers(len(frame) - 1))
    place = frame[part] + rng.uniform(0.2, 0.8) * (frame[part + 1] - frame[part])
    radius = float(rng.uniform(18, 27))
    blob = Blob(triple(map(float, place)), triple(float(radius * s) for s in rng.uniform(0.85, 1.15, 3)))
    canvas.ellipsoid(blob.centre, blob.radii, 130.0)
    scan.mark(blob, 1)
    return scan


LUNG = Layout("MSD Task06: chests with lung tumours and their masks", _task("Lung", "cancer", "lung", _lung))
COLON = Layout(
    "MSD Task10: abdomens with colon tumours and their masks", _task("Colon", "colon cancer primaries", "colon", _colon)
)

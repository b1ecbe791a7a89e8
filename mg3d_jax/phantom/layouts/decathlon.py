"""The Medical Segmentation Decathlon: `dataset.json`, `imagesTr/`, `labelsTr/`, `imagesTs/` (no labels)."""

from __future__ import annotations

import json

import numpy as np

from mg3d_jax.phantom.dataset import nifti_bytes
from mg3d_jax.phantom.layouts.base import Files, Layout
from mg3d_jax.phantom.miniature import Miniature, stream

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


def lung_files(patients: int, seed: int) -> Files:
    """Task06: chests with one or two dense tumours in the lungs."""
    tests = max(1, patients // _TEST_SHARE)
    yield "dataset.json", _dataset_json("Lung", "cancer", "lung", patients, tests)
    for number in range(1, patients + tests + 1):
        rng = stream("msd-lung", seed, number)
        scan = Miniature(rng)
        for _ in range(int(rng.integers(1, 3))):
            scan.lesion(rng, (16.0, 30.0), 70.0)
        image = nifti_bytes(scan.hounsfield(rng), scan.affine)
        if number > patients:
            yield f"imagesTs/lung_{number:03d}.nii.gz", image
        else:
            yield f"imagesTr/lung_{number:03d}.nii.gz", image
            yield f"labelsTr/lung_{number:03d}.nii.gz", nifti_bytes(scan.mask.astype(np.uint8), scan.affine)


LUNG = Layout("MSD Task06: chests with lung tumours and their masks", lung_files)

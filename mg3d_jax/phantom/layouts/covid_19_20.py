"""COVID-19-20: `Train/volume-covid19-A-0001_ct.nii.gz` with `..._seg.nii.gz`; `Validation/` without masks."""

from __future__ import annotations

import numpy as np

from mg3d_jax.phantom.dataset import nifti_bytes
from mg3d_jax.phantom.layouts.base import Files, Layout
from mg3d_jax.phantom.miniature import chest, stream

_TEST_SHARE = 5  # one unlabelled volume for so many labelled ones


def files(patients: int, seed: int) -> Files:
    """Two to five hazy opacities in a chest, marked."""
    for number in range(1, patients + max(1, patients // _TEST_SHARE) + 1):
        rng = stream("covid-19-20", seed, number)
        scan = chest(rng)
        for _ in range(int(rng.integers(2, 6))):
            scan.lesion(rng, (18.0, 34.0), -350.0)
        folder = "Train" if number <= patients else "Validation"
        path = f"{folder}/volume-covid19-A-{number:04d}"
        yield f"{path}_ct.nii.gz", nifti_bytes(scan.hounsfield(rng), scan.affine)
        if number <= patients:
            yield f"{path}_seg.nii.gz", nifti_bytes(scan.mask.astype(np.uint8), scan.affine)


COVID_19_20 = Layout("COVID-19-20: COVID-19 lesions and their masks", files)

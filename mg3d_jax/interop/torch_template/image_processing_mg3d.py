"""A chest CT as a file, a DICOM folder or an array -> the volume that the model takes, exactly as its training data were made.

    processor = AutoImageProcessor.from_pretrained(FOLDER, trust_remote_code=True)
    inputs = processor("scan.nii.gz")  # or a folder of slices, or (array, affine), or a list of such
    embedding = model.encode_volume(inputs["pixel_values"])

What the numbers of a file mean in HU is decided by evidence (`mg3d_hounsfield.py`); a scan on which that cannot be decided, or
that has holes, voxels that are not finite or no usable geometry, is refused with the reason. Needs numpy, scipy, nibabel and
isal; DICOM needs pydicom.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
from transformers.image_processing_utils import BaseImageProcessor, BatchFeature

from mg3d_jax.errors import UserError
from mg3d_jax.prepare.scans import ScanSource, read_scan, trained_grid


class MG3DImageProcessor(BaseImageProcessor):
    """Brings scans to the grid of the model.

    Args:
        size_voxels, spacing_mm: of the grid, RAS+. No spacing with policy "fraction": it varies from scan to scan.
        policy, fraction: which part of a scan it is laid on; see `mg3d_geometry.POLICIES`.
        modality: "CT", or "MR", whose intensities are mapped to numbers of the size of HU.
        clip_hu: what the training data were cut to.
    """

    model_input_names: ClassVar[list[str]] = ["pixel_values"]

    def __init__(
        self,
        size_voxels: Sequence[int] = (128, 128, 96),
        spacing_mm: Sequence[float] | None = (2.8, 2.8, 3.5),
        policy: str = "center",
        fraction: Sequence[float] | None = None,
        modality: str = "CT",
        clip_hu: Sequence[float] = (-1024, 3071),
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        self.size_voxels, self.spacing_mm = list(size_voxels), list(spacing_mm) if spacing_mm else None
        self.policy, self.fraction = policy, list(fraction) if fraction else None
        self.modality, self.clip_hu = modality, list(clip_hu)

    def preprocess(
        self, images: ScanSource | Sequence[ScanSource], return_tensors: str | None = "pt", **kwargs: Any
    ) -> BatchFeature:
        """`pixel_values`, int16 HU [B, X, Y, Z].

        Args:
            images: a NIfTI file, a folder with the slices of one DICOM series, `(array [i, j, k], affine [4, 4])` with the
                affine of NIfTI (voxel -> mm, RAS+), or a list of such.
            return_tensors: "pt" or "np".

        Raises:
            UserError: one of them cannot be used; the message says which and why.
        """
        if kwargs:
            raise TypeError(f"{sorted(kwargs)}: not known to this processor; it takes images and return_tensors")
        x, y, z = self.size_voxels
        grid = trained_grid((x, y, z), {"policy": self.policy, "fraction": self.fraction}, self.spacing_mm)
        low, high = self.clip_hu
        volumes = [read_scan(one, grid, modality=self.modality).volume for one in _listed(images)]
        volumes = [np.clip(volume, low, high).astype(np.int16) for volume in volumes]
        return BatchFeature({"pixel_values": np.stack(volumes)}, tensor_type=return_tensors)


def _listed(images: ScanSource | Sequence[ScanSource]) -> list[ScanSource]:
    """One scan or several -> several."""
    pair = isinstance(images, tuple) and len(images) == 2 and all(isinstance(part, np.ndarray) for part in images)
    if isinstance(images, np.ndarray):
        raise UserError("an array alone does not say how it lies: give (array, affine)")
    return [images] if pair or not isinstance(images, list | tuple) else list(images)  # type: ignore[list-item]

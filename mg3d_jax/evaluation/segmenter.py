"""The trained segmentation of a run: logits of volumes of any size, and classes of the voxels of a scan in its own space."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mg3d_jax import sharding
from mg3d_jax.batch import AIR_HU
from mg3d_jax.errors import UserError
from mg3d_jax.evaluation.attend import in_scan_space
from mg3d_jax.evaluation.sliding_window import SlidingWindow, sliding_window
from mg3d_jax.prepare.scans import Scan
from mg3d_jax.tasks.segmentation import HEAD
from mg3d_jax.training import inputs
from mg3d_jax.training.restore import RestoredRun
from mg3d_jax.training.state import Setup


def logits_of(setup: Setup, params: Any, volumes: jax.Array, windows: SlidingWindow) -> jax.Array:
    """HU [B, X, Y, Z] of any size -> logits float32 [B, X, Y, Z, C], blended over windows. Traced, within the run's mesh."""
    head, hounsfield_windows = params[HEAD], setup.config.data.windows

    def network(crops: jax.Array) -> jax.Array:
        given = inputs.window(crops, hounsfield_windows)[:, None]
        (features,) = setup.model.apply({"params": params}, given, False, method="segment")
        return features[:, 0].astype(jnp.float32) @ head["kernel"] + head["bias"]

    return sliding_window(network, volumes, windows, AIR_HU)


@dataclass(frozen=True)
class Segmented:
    """The classes of a scan's voxels."""

    classes: np.ndarray  # uint8 [i, j, k] of the scan's own shape: 0 background, k the k-th of `names`
    names: tuple[str, ...]  # background first
    scan: Scan

    @property
    def millilitres(self) -> dict[str, float]:
        """The volume of every class but the background."""
        voxel = abs(np.linalg.det(self.scan.scan_affine[:3, :3])) / 1000
        counts = np.bincount(self.classes.ravel(), minlength=len(self.names))
        return {name: float(counts[number] * voxel) for number, name in enumerate(self.names) if number}

    def save(self, path: str | Path) -> None:
        """Writes `classes` as a NIfTI file on the voxels of the scan: the same shape and affine as its file."""
        import nibabel as nib

        nib.save(nib.Nifti1Image(self.classes, self.scan.header_affine), path)


class Segmenter:
    """`scan -> Segmented` for one run with `tasks.segmentation`, on all devices. Compiled once per shape of a scan.

    Args:
        overlap: share of a window that the next one covers, too.
        per_call: windows that go through the network together, all devices together; rounded up to a multiple of them.

    Raises:
        UserError: the run does not segment.
    """

    def __init__(self, run: RestoredRun, overlap: float = 0.5, per_call: int = 4):
        if HEAD not in run.params:
            raise UserError(f"{run.folder} does not segment: it was not trained with tasks.segmentation")
        shards = sharding.batch_shards(run.setup.mesh)
        self.run = run
        self.windows = SlidingWindow(run.config.model.volume_size, overlap, -(-per_call // shards) * shards)
        count = run.config.tasks["segmentation"].num_classes
        names = run.prepared("mask_names") or ()
        self.names = tuple(names) if len(names) == count else ("background", *(f"class {n}" for n in range(1, count)))
        whole = sharding.replicated(run.setup.mesh)
        self._shares = jax.jit(
            self._shares_of, in_shardings=(run.setup.shardings["params"], whole), out_shardings=whole
        )

    def __call__(self, scan: Scan) -> Segmented:
        """The class of each voxel: shares of the classes, trilinear between the voxels of the grid, and of them the largest.

        Args:
            scan: whole, as `scans.read_scan` gives it; what lies outside of its grid is background.
        """
        with sharding.in_mesh(self.run.setup.mesh):
            shares = np.asarray(jax.block_until_ready(self._shares(self.run.params, scan.volume)))
        largest = np.zeros(scan.shape, np.float32)
        classes = np.zeros(scan.shape, np.uint8)
        for number in range(shares.shape[-1]):
            share = in_scan_space(shares[..., number], scan.affine, scan.shape, scan.scan_affine)
            classes[share > largest] = number
            largest = np.maximum(largest, share)
        return Segmented(classes, self.names, scan)

    def _shares_of(self, params: Any, volume: jax.Array) -> jax.Array:
        return jax.nn.softmax(logits_of(self.run.setup, params, volume[None], self.windows)[0])

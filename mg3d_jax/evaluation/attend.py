"""Where in a scan a sentence looks: one number for each patch, and the same as a map in the scan's own space.

Two maps. `attention`: the weights with which the sentence, as query, reads the volume's patches (the head of the
matching and discrimination objectives; only runs trained with one of them have it). `occlusion`: by how much the
similarity of scan and sentence falls when a patch is filled with air (Zeiler and Fergus 2014); it needs no particular
head and shows what the embedding depends on. Neither is a segmentation.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy  # its parts come on first use

from mg3d_jax import charts
from mg3d_jax.errors import UserError
from mg3d_jax.models.mg3d import text_embedding, volume_embedding
from mg3d_jax.models.patches import patchify, unpatchify
from mg3d_jax.objectives.pairwise import l2_normalize
from mg3d_jax.prepare.scans import Scan
from mg3d_jax.training import inputs as step_inputs
from mg3d_jax.training.restore import RestoredRun, exact_model

ATTENTION_HEAD = "sentence_conditioned_volume"
METHODS = ("auto", "attention", "occlusion")
OCCLUSIONS_PER_CALL = 8
MAX_OPACITY = 0.75
DISPLAY_WINDOW = (-1000.0, 400.0)  # HU


@dataclass(frozen=True)
class Relevance:
    """How much each part of a scan matters to a sentence."""

    patches: np.ndarray  # float32 [gx, gy, gz]: one number per patch, RAS+
    method: str  # "attention" or "occlusion"
    text: str
    scan: Scan
    cell: tuple[int, int, int]  # voxels of the grid in a patch

    @property
    def affine(self) -> np.ndarray:
        """[4, 4], patch centres -> mm."""
        return patch_affine(self.scan.affine, self.cell)

    @property
    def map(self) -> np.ndarray:
        """float32 of the scan's own shape, trilinear between patch centres. Voxels that the model did not see are 0."""
        return in_scan_space(self.patches, self.affine, self.scan.shape, self.scan.scan_affine)

    @property
    def peak(self) -> tuple[int, int, int]:
        """Where the map is strongest, in mm (RAS+)."""
        x, y, z, _ = self.affine @ [*np.unravel_index(np.argmax(self.patches), self.patches.shape), 1.0]
        return round(x), round(y), round(z)

    def save(self, path: str | Path) -> None:
        """Writes `map` as a NIfTI file with the header geometry of the scan."""
        import nibabel as nib

        nib.save(nib.Nifti1Image(self.map, self.scan.header_affine), path)


class SentenceMaps:
    """`(scan, sentence) -> Relevance` for one run, in float32 whatever the run computed in; compiled once per method."""

    def __init__(self, run: RestoredRun):
        self.params, self.tokenizer = run.params, run.view_tokenizer
        self.model, self.options = exact_model(run.config, self.tokenizer.vocab_size), run.config.model
        self.windows = run.config.data.windows
        self._weights = jax.jit(self._weights_of)
        self._similarity = jax.jit(self._similarity_of)

    def __call__(self, scan: Scan, text: str, method: str = "auto") -> Relevance:
        """How much each patch of the scan matters to the sentence `text`.

        "attention" maps are relative to even attention: 1 everywhere if the sentence looks nowhere in particular.
        "occlusion" maps are differences of cosine similarity: positive where the patch supports the sentence. "auto" is
        "attention" where the run has that head.

        Raises:
            UserError: the method is unknown, or the run has no head for "attention".
        """
        if method not in METHODS:
            raise UserError(f"--method {method!r}: choose one of {', '.join(METHODS)}.")
        has_head = ATTENTION_HEAD in self.params
        if method == "attention" and not has_head:
            raise UserError(
                "--method attention needs a run trained with objectives.matching or objectives.discrimination; "
                "use --method occlusion."
            )
        if method == "auto":
            method = "attention" if has_head else "occlusion"
        row = self.tokenizer([text])
        fields = {name: jnp.asarray(row[name])[None] for name in ("token_ids", "token_mask", "sentence_index")}
        cell, grid = self.options.token_cell(), self.options.token_grid()
        values = self._attention(scan, fields) if method == "attention" else self._occlusion(scan, fields, cell)
        return Relevance(np.asarray(values, np.float32).reshape(grid), method, text, scan, cell)

    def _attention(self, scan: Scan, fields: dict[str, jax.Array]) -> np.ndarray:
        """[N], times N."""
        found = np.asarray(self._weights(self.params, jnp.asarray(scan.volume), fields))
        return found * found.size

    def _weights_of(self, params: Any, volume: jax.Array, fields: dict[str, jax.Array]) -> jax.Array:
        variables = {"params": params}
        windowed = step_inputs.window(volume[None], self.windows)
        tokens = self.model.apply(variables, windowed, method="embed_volume")["volume_tokens"]
        sentences = self.model.apply(variables, fields, method="embed_report")["sentences"]

        def read(bound: Any, sentences: jax.Array, tokens: jax.Array) -> jax.Array:
            return getattr(bound, ATTENTION_HEAD)(sentences, tokens)

        _, captured = self.model.apply(variables, sentences, tokens, method=read, mutable="intermediates")
        by_head = captured["intermediates"][ATTENTION_HEAD]["attention"]["attention"][0]  # [1, H, S, N]
        return by_head[0, :, 0].mean(axis=0)

    def _occlusion(self, scan: Scan, fields: dict[str, jax.Array], cell: tuple[int, int, int]) -> np.ndarray:
        """[N]: by how much the similarity falls without each patch."""
        whole = np.asarray(patchify(jnp.asarray(scan.volume)[None, ..., None], cell))[0]  # [N, voxels]
        count, values = len(whole), np.zeros(len(whole))
        before = float(self._similarity(self.params, np.repeat(whole[None], OCCLUSIONS_PER_CALL, axis=0), fields)[0])
        for first in range(0, count, OCCLUSIONS_PER_CALL):
            # The last call repeats some: one shape to compile.
            chosen = np.arange(first, first + OCCLUSIONS_PER_CALL) % count
            occluded = np.repeat(whole[None], OCCLUSIONS_PER_CALL, axis=0)
            occluded[np.arange(OCCLUSIONS_PER_CALL), chosen] = step_inputs.AIR_HU
            values[chosen] = before - np.asarray(self._similarity(self.params, occluded, fields))
        return values

    def _similarity_of(self, params: Any, patches: jax.Array, fields: dict[str, jax.Array]) -> jax.Array:
        """Cosine similarity [B] of volumes, given as patches [B, N, voxels], to one text."""
        volumes = unpatchify(patches, self.options.token_cell(), self.options.volume_size)[..., 0]
        windowed = step_inputs.window(volumes, self.windows)
        image = self.model.apply({"params": params}, windowed, method="embed_volume")["volume_embedding"]
        text = self.model.apply({"params": params}, fields, method="embed_report")["report_embedding"]
        return jnp.sum(volume_embedding(params, image) * text_embedding(params, l2_normalize(text)), axis=-1)


def patch_affine(affine: np.ndarray, patch_size: tuple[int, int, int]) -> np.ndarray:
    """Affine of the patch grid (patch centres -> mm) from that of the voxels that it is cut from."""
    to_voxel = np.diag([*patch_size, 1.0])
    to_voxel[:3, 3] = (np.array(patch_size) - 1) / 2
    return affine @ to_voxel


def in_scan_space(
    patches: np.ndarray, affine: np.ndarray, shape: tuple[int, ...], scan_affine: np.ndarray
) -> np.ndarray:
    """The patch map at every voxel of the scan, trilinear between patch centres: float32 of `shape`.

    `affine` is the patch grid's, `scan_affine` the scan's. Voxels that the model did not see are 0.
    """
    to_patch = np.linalg.inv(affine) @ scan_affine
    place = {"matrix": to_patch[:3, :3], "offset": to_patch[:3, 3], "output_shape": shape}
    smooth = scipy.ndimage.affine_transform(patches.astype(np.float32), **place, order=1, mode="nearest")
    seen = scipy.ndimage.affine_transform(
        np.ones_like(patches, np.float32), **place, order=0, mode="grid-constant", cval=0
    )
    return np.where(seen > 0.5, smooth, 0).astype(np.float32)


@charts.plain_text()
def write_overlay(path: Path, found: Relevance) -> None:
    """Axial, coronal and sagittal slices through the strongest patch, the patient's right on the left.

    The colour fades where the map says nothing (occlusion: 0; attention: as much as even attention or less), so that the
    CT stays readable there.
    """
    from matplotlib.figure import Figure

    volume, spacing = found.scan.volume, np.sqrt((found.scan.affine[:3, :3] ** 2).sum(axis=0))
    to_voxel = np.linalg.inv(patch_affine(np.eye(4), found.cell))
    heat = scipy.ndimage.affine_transform(
        found.patches, to_voxel[:3, :3], to_voxel[:3, 3], output_shape=volume.shape, order=1, mode="nearest"
    )
    colours, neutral = _colours(found)
    strength = np.abs(heat - neutral) / max(colours.norm.vmax - neutral, 1e-12)
    if found.method == "attention":
        strength = np.where(heat > neutral, strength, 0)
    peak = np.unravel_index(np.argmax(found.patches), found.patches.shape)
    centre = [int((index + 0.5) * side) for index, side in zip(peak, found.cell, strict=True)]
    extent = np.array(volume.shape) * spacing
    figure = Figure(figsize=(12, 4.5), layout="constrained")
    panels = figure.subplots(1, 3, width_ratios=[extent[0], extent[0], extent[1]])
    for axis, panel, name in zip((2, 1, 0), panels, ("axial", "coronal", "sagittal"), strict=True):
        across, up = (i for i in range(3) if i != axis)
        options = {"origin": "lower", "aspect": spacing[up] / spacing[across]}
        window = {"cmap": "gray", "vmin": DISPLAY_WINDOW[0], "vmax": DISPLAY_WINDOW[1]}
        panel.imshow(volume.take(centre[axis], axis).T, **options, **window)
        coloured = colours.to_rgba(heat.take(centre[axis], axis).T)
        coloured[..., 3] = MAX_OPACITY * np.clip(strength.take(centre[axis], axis).T, 0, 1)
        panel.imshow(coloured, **options)
        panel.set(title=name, xticks=[], yticks=[])
        if across == 0:  # x grows to the patient's right, which is shown on the left
            panel.invert_xaxis()
        side = "R" if across == 0 else "P"
        panel.text(0.01, 0.98, side, transform=panel.transAxes, color="white", va="top")
    label = "attention / even attention" if found.method == "attention" else "fall of similarity without the patch"
    figure.colorbar(colours, ax=panels, label=label, shrink=0.8)
    figure.suptitle(found.text)
    figure.savefig(path, dpi=120)


def _colours(found: Relevance) -> tuple[Any, float]:
    """Colour scale of the map, and the value that says nothing."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    if found.method == "attention":
        return ScalarMappable(Normalize(1.0, max(float(found.patches.max()), 1.0 + 1e-6)), "inferno"), 1.0
    limit = max(float(np.abs(found.patches).max()), 1e-6)  # supports the sentence: red; speaks against it: blue
    return ScalarMappable(Normalize(-limit, limit), "coolwarm"), 0.0

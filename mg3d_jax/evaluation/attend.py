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
from mg3d_jax.prepare.geometry import Grid, ras_order, voxel_spacing
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
    similarity: float  # cosine of the whole scan and the sentence

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
        """Writes `map` as a NIfTI file with the header geometry of the scan, in mm."""
        import nibabel as nib

        image = nib.Nifti1Image(self.map, self.scan.header_affine)
        image.header.set_xyzt_units("mm")
        nib.save(image, path)


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
        whole = np.asarray(patchify(jnp.asarray(scan.volume)[None, ..., None], cell))[0]  # [N, voxels]
        # As many at once as `_occlusion` takes: one shape to compile.
        copies = np.repeat(whole[None], OCCLUSIONS_PER_CALL, axis=0)
        similarity = float(self._similarity(self.params, copies, fields)[0])
        if method == "attention":
            values = self._attention(scan, fields)
        else:
            values = self._occlusion(whole, fields, similarity)
        return Relevance(np.asarray(values, np.float32).reshape(grid), method, text, scan, cell, similarity)

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

    def _occlusion(self, whole: np.ndarray, fields: dict[str, jax.Array], before: float) -> np.ndarray:
        """[N]: by how much the similarity falls, from `before`, without each of the patches `whole` [N, voxels]."""
        count, values = len(whole), np.zeros(len(whole))
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


SIDES = (("L", "R"), ("P", "A"), ("I", "S"))  # where each axis of RAS+ comes from and goes to


def own_grid(scan: Scan) -> Grid:
    """A grid with the voxels of the scan itself, RAS+, on which `read_scan(..., whole=True)` shows it as it is."""
    order, _ = ras_order(scan.scan_affine)
    x, y, z = (float(voxel_spacing(scan.scan_affine)[axis]) for axis in order)
    return Grid((1, 1, 1), (x, y, z))


@charts.plain_text()
def write_overlay(path: Path, found: Relevance, shown: Scan | None = None, name: str = "") -> None:
    """Axial, coronal and sagittal slices through the strongest patch, with a cross there; the patient's right on the left.

    The colour fades where the map says nothing (occlusion: 0; attention: as much as even attention or less), so that the
    CT stays readable there.

    Args:
        shown: the scan to draw, e.g. on its `own_grid`; None: as the model saw it.
        name: of the scan, for the title.
    """
    from matplotlib.figure import Figure

    shown = shown or found.scan
    volume, spacing = shown.volume, np.sqrt((shown.affine[:3, :3] ** 2).sum(axis=0))
    heat = in_scan_space(found.patches, found.affine, volume.shape, shown.affine)
    seen = in_scan_space(np.ones_like(found.patches), found.affine, volume.shape, shown.affine) > 0
    colours, neutral = _colours(found)
    strength = np.where(seen, np.abs(heat - neutral) / max(colours.norm.vmax - neutral, 1e-12), 0)
    if found.method == "attention":
        strength = np.where(heat > neutral, strength, 0)
    centre = _voxel(found, shown)
    extent = np.array(volume.shape) * spacing
    figure = Figure(figsize=(12, 4.8), layout="constrained")
    panels = figure.subplots(1, 3, width_ratios=[extent[0], extent[0], extent[1]])
    for axis, panel, plane in zip((2, 1, 0), panels, ("axial", "coronal", "sagittal"), strict=True):
        across, up = (i for i in range(3) if i != axis)
        options = {"origin": "lower", "aspect": spacing[up] / spacing[across]}
        window = {"cmap": "gray", "vmin": DISPLAY_WINDOW[0], "vmax": DISPLAY_WINDOW[1]}
        panel.imshow(volume.take(centre[axis], axis).T, **options, **window)
        coloured = colours.to_rgba(heat.take(centre[axis], axis).T)
        coloured[..., 3] = MAX_OPACITY * np.clip(strength.take(centre[axis], axis).T, 0, 1)
        panel.imshow(coloured, **options)
        panel.axvline(centre[across], color="lime", linewidth=0.6, alpha=0.7)
        panel.axhline(centre[up], color="lime", linewidth=0.6, alpha=0.7)
        place = shown.affine[axis] @ [*centre, 1.0]
        panel.set(
            title=f"{plane}, {'xyz'[axis]} = {place:.0f} mm, slice {centre[axis] + 1} of {volume.shape[axis]}",
            xticks=[], yticks=[],
        )  # fmt: skip
        panel.title.set_fontsize(9)
        if across == 0:  # x grows to the patient's right, which is shown on the left
            panel.invert_xaxis()
        low, high = SIDES[across]
        _name_sides(panel, (high, low) if across == 0 else (low, high), SIDES[up])
    label = "attention / even attention" if found.method == "attention" else "fall of similarity without the patch"
    figure.colorbar(colours, ax=panels, label=label, shrink=0.8)
    figure.suptitle(f"{found.text}\n{name}{': ' if name else ''}similarity {found.similarity:.3f}", fontsize=10)
    figure.savefig(path, dpi=120)


def _voxel(found: Relevance, shown: Scan) -> list[int]:
    """The voxel of `shown` in the middle of the strongest patch; the nearest one where it ends before."""
    peak = [*np.unravel_index(np.argmax(found.patches), found.patches.shape), 1.0]
    place = np.linalg.inv(shown.affine) @ found.affine @ peak
    return [int(np.clip(round(x), 0, side - 1)) for x, side in zip(place[:3], shown.volume.shape, strict=True)]


def _name_sides(panel: Any, across: tuple[str, str], up: tuple[str, str]) -> None:
    """Letters at the left and right, and at the bottom and top."""
    places = {across[0]: (0.01, 0.5), across[1]: (0.99, 0.5), up[0]: (0.5, 0.01), up[1]: (0.5, 0.99)}
    for letter, (x, y) in places.items():
        panel.text(
            x, y, letter, transform=panel.transAxes, color="white", fontsize=9,
            ha={0.01: "left", 0.99: "right"}.get(x, "center"), va={0.01: "bottom", 0.99: "top"}.get(y, "center"),
        )  # fmt: skip


def _colours(found: Relevance) -> tuple[Any, float]:
    """Colour scale of the map, and the value that says nothing."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    if found.method == "attention":
        return ScalarMappable(Normalize(1.0, max(float(found.patches.max()), 1.0 + 1e-6)), "inferno"), 1.0
    limit = max(float(np.abs(found.patches).max()), 1e-6)  # supports the sentence: red; speaks against it: blue
    return ScalarMappable(Normalize(-limit, limit), "coolwarm"), 0.0

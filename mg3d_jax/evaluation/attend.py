"""`mg3d attend`: where in a scan a sentence looks, as a NIfTI in the scan's own space and a PNG overlay.

Two maps. `attention`: the weights with which the sentence, as query, reads the volume's patches (the head of the
matching and discrimination objectives; only runs trained with one of them have it). `occlusion`: by how much the
similarity of scan and sentence falls when a patch is filled with air (Zeiler and Fergus 2014); it needs no particular
head and shows what the embedding depends on. Neither is a segmentation.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import nibabel as nib
import numpy as np
from scipy import ndimage

from mg3d_jax.errors import UserError
from mg3d_jax.interop.export_run import Run, load_run, reference_model
from mg3d_jax.models.volume_encoder import patchify, unpatchify
from mg3d_jax.prepare.geometry import POLICIES, Grid
from mg3d_jax.prepare.nifti import VolumeError
from mg3d_jax.prepare.volumes import PreparedVolume, prepare_volume
from mg3d_jax.training import inputs as step_inputs

ATTENTION_HEAD = "sentence_conditioned_volume"
METHODS = ("auto", "attention", "occlusion")
OCCLUSIONS_PER_CALL = 8
MAX_OPACITY = 0.75
DISPLAY_WINDOW = (-1000.0, 400.0)  # HU


@dataclass(frozen=True)
class Relevance:
    """One number per patch, [gx, gy, gz] in RAS+ order, and how it was found."""

    patches: np.ndarray
    method: str


def relevance(run: Run, volume: np.ndarray, text: str, method: str = "auto") -> Relevance:
    """How much each patch of `volume` (int16 HU [X, Y, Z] on the run's grid) matters to the sentence `text`.

    "attention" maps are relative to even attention: 1 everywhere if the sentence looks nowhere in particular.
    "occlusion" maps are differences of cosine similarity: positive where the patch supports the sentence.

    Raises:
        UserError: the method is unknown, or the run has no head for "attention".
    """
    if method not in METHODS:
        raise UserError(f"--method {method!r}: choose one of {', '.join(METHODS)}.")
    has_head = ATTENTION_HEAD in run.params
    if method == "attention" and not has_head:
        raise UserError(
            "--method attention needs a run trained with objectives.matching or objectives.discrimination; "
            "use --method occlusion."
        )
    if method == "auto":
        method = "attention" if has_head else "occlusion"
    tokenizer = run.tokenizer
    model, config = reference_model(run.config, tokenizer.vocab_size)
    row = tokenizer([text])
    fields = {name: jnp.asarray(row[name])[None] for name in ("token_ids", "token_mask", "sentence_index")}
    find = _attention if method == "attention" else _occlusion
    values = find(model, config, run.params, volume, fields, config.model.token_cell())
    return Relevance(np.asarray(values, np.float32).reshape(config.model.token_grid()), method)


def _attention(model: Any, config: Any, params: Any, volume: np.ndarray, fields: dict, patch_size: tuple) -> np.ndarray:
    def weights(params: Any, volume: jax.Array) -> jax.Array:
        variables = {"params": params}
        windowed = step_inputs.window(volume[None], config.data.windows)
        tokens = model.apply(variables, windowed, method="embed_volume")["volume_tokens"]
        sentences = model.apply(variables, fields, method="embed_report")["sentences"]

        def read(bound: Any, sentences: jax.Array, tokens: jax.Array) -> jax.Array:
            return getattr(bound, ATTENTION_HEAD)(sentences, tokens)

        _, captured = model.apply(variables, sentences, tokens, method=read, mutable="intermediates")
        by_head = captured["intermediates"][ATTENTION_HEAD]["attention"]["attention"][0]  # [1, H, S, N]
        return by_head[0, :, 0].mean(axis=0)

    found = jax.device_get(jax.jit(weights)(params, jnp.asarray(volume)))
    return found * found.size


def _occlusion(model: Any, config: Any, params: Any, volume: np.ndarray, fields: dict, patch_size: tuple) -> np.ndarray:
    size = tuple(config.model.volume_size)

    def similarity(params: Any, patches: jax.Array) -> jax.Array:
        volumes = unpatchify(patches, patch_size, size)[..., 0]
        windowed = step_inputs.window(volumes, config.data.windows)
        image = model.apply({"params": params}, windowed, method="embed_volume")["volume_embedding"]
        text = model.apply({"params": params}, fields, method="embed_report")["report_embedding"]
        norms = jnp.linalg.norm(image, axis=-1) * jnp.linalg.norm(text, axis=-1)
        return jnp.sum(image * text, axis=-1) / jnp.maximum(norms, 1e-12)

    similarity = jax.jit(similarity)
    whole = np.asarray(patchify(volume[None, ..., None], patch_size))[0]  # [N, voxels]
    count = len(whole)
    values = np.zeros(count)
    before = float(similarity(params, np.repeat(whole[None], OCCLUSIONS_PER_CALL, axis=0))[0])
    for first in range(0, count, OCCLUSIONS_PER_CALL):
        chosen = (
            np.arange(first, first + OCCLUSIONS_PER_CALL) % count
        )  # the last call repeats some: one shape to compile
        occluded = np.repeat(whole[None], OCCLUSIONS_PER_CALL, axis=0)
        occluded[np.arange(OCCLUSIONS_PER_CALL), chosen] = step_inputs.AIR_HU
        values[chosen] = before - np.asarray(similarity(params, occluded))
    return values


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
    smooth = ndimage.affine_transform(patches.astype(np.float32), **place, order=1, mode="nearest")
    seen = ndimage.affine_transform(np.ones_like(patches, np.float32), **place, order=0, mode="grid-constant", cval=0)
    return np.where(seen > 0.5, smooth, 0).astype(np.float32)


def write_overlay(path: Path, prepared: PreparedVolume, found: Relevance, patch_size: tuple, text: str) -> None:
    """Axial, coronal and sagittal slices through the strongest patch, the patient's right on the left.

    The colour fades where the map says nothing (occlusion: 0; attention: as much as even attention or less), so that the
    CT stays readable there.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    volume, spacing = prepared.volume, np.sqrt((prepared.affine[:3, :3] ** 2).sum(axis=0))
    to_voxel = np.linalg.inv(patch_affine(np.eye(4), patch_size))
    heat = ndimage.affine_transform(
        found.patches, to_voxel[:3, :3], to_voxel[:3, 3], output_shape=volume.shape, order=1, mode="nearest"
    )
    colours, neutral = _colours(found)
    strength = np.abs(heat - neutral) / max(colours.norm.vmax - neutral, 1e-12)
    if found.method == "attention":
        strength = np.where(heat > neutral, strength, 0)
    peak = np.unravel_index(np.argmax(found.patches), found.patches.shape)
    centre = [int((index + 0.5) * patch) for index, patch in zip(peak, patch_size, strict=True)]
    extent = np.array(volume.shape) * spacing
    widths = [extent[0], extent[0], extent[1]]
    figure, panels = plt.subplots(1, 3, figsize=(12, 4.5), width_ratios=widths, layout="constrained")
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
    figure.suptitle(text)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _colours(found: Relevance) -> tuple[Any, float]:
    """Colour scale of the map, and the value that says nothing."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    if found.method == "attention":
        return ScalarMappable(Normalize(1.0, max(float(found.patches.max()), 1.0 + 1e-6)), "inferno"), 1.0
    limit = max(float(np.abs(found.patches).max()), 1e-6)  # supports the sentence: red; speaks against it: blue
    return ScalarMappable(Normalize(-limit, limit), "coolwarm"), 0.0


def parser() -> argparse.ArgumentParser:
    """Options of `mg3d attend`."""
    root = argparse.ArgumentParser(
        prog="mg3d attend",
        description="Writes where in a scan a sentence looks: OUT/map.nii.gz in the scan's own space, OUT/overlay.png.",
    )
    root.add_argument("--workdir", type=Path, required=True, help="the run")
    root.add_argument("--volume", type=Path, required=True, metavar="FILE", help="CT as .nii or .nii.gz")
    root.add_argument("--text", required=True, help='one sentence, e.g. "right pleural effusion"')
    root.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to write")
    root.add_argument("--method", choices=METHODS, default="auto", help="auto: attention where the run has that head")
    root.add_argument("--step", type=int, help="which checkpoint (default: the newest)")
    root.add_argument(
        "--spacing", type=float, nargs=3, metavar=("X", "Y", "Z"), help="mm per voxel that the run was trained with"
    )
    root.add_argument("--policy", choices=sorted(POLICIES), default="center", help="grid policy of `mg3d prepare`")
    return root


def main(argv: list[str]) -> int:
    """Runs the command and prints where the map is strongest."""
    args = parser().parse_args(argv)
    run = load_run(args.workdir, args.step, None if args.spacing is None else tuple(args.spacing))
    size, patch_size = tuple(run.config.model.volume_size), run.config.model.token_cell()
    try:
        prepared = prepare_volume(args.volume, Grid(size, run.spacing, args.policy))
        scan = nib.load(args.volume)
    except (VolumeError, OSError, nib.filebasedimages.ImageFileError) as error:
        raise UserError(f"{args.volume}: cannot be used ({error}).") from error
    found = relevance(run, prepared.volume, args.text, args.method)
    affine = patch_affine(prepared.affine, patch_size)
    args.out.mkdir(parents=True, exist_ok=True)
    whole = in_scan_space(found.patches, affine, scan.shape[:3], scan.affine)
    nib.save(nib.Nifti1Image(whole, scan.affine), args.out / "map.nii.gz")
    write_overlay(args.out / "overlay.png", prepared, found, patch_size, args.text)
    peak = np.unravel_index(np.argmax(found.patches), found.patches.shape)
    place = (affine @ [*peak, 1.0])[:3].round().astype(int)
    low, high = found.patches.min(), found.patches.max()
    print(f"{found.method} map of {args.text!r} at step {run.step}: {low:.4g} to {high:.4g}")
    print(f"strongest around {tuple(int(mm) for mm in place)} mm (RAS+)")
    print(f"written: {args.out / 'map.nii.gz'}, {args.out / 'overlay.png'}")
    return 0

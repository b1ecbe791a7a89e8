"""What masked volume modelling looks like: slices of the original, of what the encoder saw, and of what was filled in."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image, ImageDraw

from mg3d_jax import sharding
from mg3d_jax.models.patches import unpatchify
from mg3d_jax.objectives.base import Enabled
from mg3d_jax.training.inputs import model_inputs
from mg3d_jax.training.state import Setup

Batch = dict[str, jax.Array]

PATIENTS = 3
COLUMNS = ("original", "seen", "reconstructed")
# name, axis that the slice is across, the letters of its left, right and upper edge
PLANES = (("axial", 2, ("R", "L", "A")), ("coronal", 1, ("R", "L", "S")), ("sagittal", 0, ("A", "P", "S")))
HIDDEN = np.array([92, 100, 132], np.uint8)  # a bluish grey: 0 HU is plain grey in a symmetric window
LONG_SIDE = 192  # pixels of the longest side of a slice
MARGIN, TITLE = 4, 14


class Reconstructions:
    """`(params, batch) -> {"reconstruction-0": uint8 [H, W, 3], ...}`: one image for each of a few patients.

    Rows are the middle axial, coronal and sagittal slice in a radiologist's orientation (the patient's right on the left,
    anterior up; sagittal: anterior on the left), columns the original, what the encoder saw, and the original with the
    reconstruction in its hidden patches. HU window (channel) 0. The masks are the same at every call, so that steps can be
    compared. Empty without `objectives.volume_reconstruction`. All processes must call it.

    Args:
        special: ids of the tokenizer's special tokens, by name.
        spacing: mm per voxel along X, Y, Z; None draws voxels as squares.
    """

    def __init__(self, setup: Setup, special: dict[str, int], *, spacing: tuple[float, float, float] | None = None):
        self.setup, self.special, self.spacing = setup, special, spacing or (1.0, 1.0, 1.0)
        self._slices: Callable[[Any, Batch], dict] | None = None
        on = {one.name: one for one in setup.model.on}
        if "volume_reconstruction" in on:
            self._objective: Enabled = on["volume_reconstruction"]
            self._slices = jax.jit(
                self._compute,
                in_shardings=(setup.shardings["params"], sharding.batch_sharding(setup.mesh)),
                out_shardings=sharding.replicated(setup.mesh),
            )

    def __call__(self, params: Any, batch: Batch) -> dict[str, np.ndarray]:
        if self._slices is None:
            return {}
        with sharding.in_mesh(self.setup.mesh):
            found = jax.device_get(jax.block_until_ready(self._slices(params, batch)))  # on all devices
        images = {}
        for row in np.flatnonzero(found["shown"]):
            planes = {
                name: {column: found[name][column][row] for column in (*COLUMNS, "hidden")} for name, _, _ in PLANES
            }
            images[f"reconstruction-{row}"] = montage(planes, self.spacing)
        return images

    def _compute(self, params: Any, batch: Batch) -> dict[str, Any]:
        """The middle slices [K, ., .] by plane and column, and which of the K rows are patients."""
        model, sizes = self.setup.model, self.setup.config.model
        size, cell = sizes.volume_size, sizes.token_cell()
        inputs = model_inputs(batch, jax.random.key(0), model, special=self.special, train=False)
        features = model.apply({"params": params}, inputs, self._objective.needs, method="compute")
        rows, shown = distinct_patients(batch["patient_id"], batch["valid"], PATIENTS)
        prediction, patches, mask = (jnp.take(features[name], rows, axis=0) for name in self._objective.needs)
        prediction = prediction.astype(jnp.float32)
        if self._objective.options.normalize_target:
            prediction = undo_normalization(prediction, patches)
        hidden = jnp.broadcast_to(mask[..., None], patches.shape)
        filled = jnp.where(hidden, prediction, patches)
        volumes = {"original": patches, "seen": patches, "reconstructed": filled, "hidden": hidden}
        volumes = {name: unpatchify(value, cell, size)[..., 0] for name, value in volumes.items()}
        return {"shown": shown} | {
            name: {column: jnp.take(v, size[axis] // 2, axis=1 + axis) for column, v in volumes.items()}
            for name, axis, _ in PLANES
        }


def distinct_patients(patient_id: jax.Array, valid: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
    """Rows [count] of the first patients of a batch, one row each, and which of them are there (a batch may hold fewer)."""
    seen_before = jnp.any(jnp.tril(patient_id[:, None] == patient_id[None, :], k=-1) & valid[None, :], axis=1)
    first = valid & ~seen_before
    rows = jnp.argsort(~first, stable=True)[:count]
    return rows, first[rows]


def undo_normalization(prediction: jax.Array, patches: jax.Array, epsilon: float = 1e-6) -> jax.Array:
    """Turns predictions of normalised patches (`objectives.volume_reconstruction`) back, with the statistics of `patches`
    [B, N, P]."""
    patches = patches.astype(jnp.float32)
    deviation = jnp.sqrt(jnp.var(patches, axis=-1, keepdims=True) + epsilon)
    return prediction * deviation + jnp.mean(patches, axis=-1, keepdims=True)


def radiological(plane: np.ndarray) -> np.ndarray:
    """A slice of an RAS+ volume without its sliced axis -> rows from the top, columns from the left of the screen.

    What is left are (x, y), (x, z) or (y, z). The second axis grows upwards (anterior, superior); the first grows to the
    patient's right or to anterior, both of which are drawn on the left.
    """
    return plane.T[::-1, ::-1]


def montage(planes: dict[str, dict[str, np.ndarray]], spacing: tuple[float, float, float]) -> np.ndarray:
    """uint8 [H, W, 3] from windowed slices in [0, 1] by plane and column, `hidden` bool among the columns."""
    scale = LONG_SIDE / max(
        side * mm
        for name, axis, _ in PLANES
        for side, mm in zip(planes[name]["original"].shape, np.delete(spacing, axis), strict=True)
    )
    tiles = []
    for name, axis, edges in PLANES:
        across, up = np.delete(spacing, axis)
        width, height = planes[name]["original"].shape
        shape = max(1, round(width * across * scale)), max(1, round(height * up * scale))
        hidden = radiological(planes[name]["hidden"])
        tiles.append([_tile(radiological(planes[name][column]), hidden, column, shape, edges) for column in COLUMNS])
    cell = max(tile.width for row in tiles for tile in row)
    height = TITLE + sum(row[0].height + MARGIN for row in tiles) + MARGIN
    sheet = Image.new("RGB", (len(COLUMNS) * (cell + MARGIN) + MARGIN, height))
    top = TITLE + MARGIN
    for row in tiles:
        for number, tile in enumerate(row):
            sheet.paste(tile, (MARGIN + number * (cell + MARGIN) + (cell - tile.width) // 2, top))
        top += row[0].height + MARGIN
    for number, column in enumerate(COLUMNS):
        ImageDraw.Draw(sheet).text((MARGIN + number * (cell + MARGIN), 2), column, fill="white")
    return np.asarray(sheet)


def _tile(
    pixels: np.ndarray, hidden: np.ndarray, column: str, size: tuple[int, int], edges: tuple[str, str, str]
) -> Image.Image:
    """One slice with the letters of its edges. Voxels stay sharp where they are enlarged."""
    grey = np.round(np.clip(np.nan_to_num(pixels.astype(np.float32)), 0.0, 1.0) * 255).astype(np.uint8)
    colored = np.repeat(grey[..., None], 3, axis=-1)
    if column == "seen":
        colored[hidden] = HIDDEN
    enlarged = math.prod(size) > pixels.size
    tile = Image.fromarray(colored).resize(size, Image.Resampling.NEAREST if enlarged else Image.Resampling.BOX)
    left, right, top = edges
    draw, (width, height) = ImageDraw.Draw(tile), size
    for place, letter in (((2, height // 2), left), ((width - 8, height // 2), right), ((width // 2, 1), top)):
        draw.text((place[0], place[1] - (5 if letter != top else 0)), letter, fill=(255, 210, 0))
    return tile

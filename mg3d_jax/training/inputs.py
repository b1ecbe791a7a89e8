"""What the compiled step does to a batch before the towers see it: HU windows, augmentation, what objectives draw.

Everything random is drawn here from a key that depends on `(seed, step)` only: a resumed run draws the same, and so does
the same run on another mesh.
"""

from __future__ import annotations

import dataclasses
import zlib
from typing import Any

import jax
import jax.numpy as jnp

from mg3d_jax.batch import AIR_HU, UNKNOWN_LABEL
from mg3d_jax.config.parts import AugmentConfig
from mg3d_jax.data.tokens import SPECIAL_TOKENS
from mg3d_jax.errors import UserError
from mg3d_jax.models.mg3d import MG3D, SENTENCE_FEATURES
from mg3d_jax.objectives.base import abstract_batch, record_fields
from mg3d_jax.options import Group

TEXT_FIELDS = ("token_ids", "token_mask", "sentence_index", "word_index")
# Random streams of a step: the first splits off the augmentation and the objectives of version 0.1.0; whatever else draws
# gets a stream of its own name, so that nothing moves when it is added.
STREAMS = ("augment", "alignment", "volume_reconstruction", "report_reconstruction")


def window(volume: jax.Array, windows: tuple[tuple[float, float], ...], dtype: jnp.dtype = jnp.float32) -> jax.Array:
    """HU `[B, X, Y, Z]` -> `[B, X, Y, Z, C]` in [0, 1], one channel per `(lower, upper)` window in HU."""
    hounsfield = volume.astype(jnp.float32)
    channels = [jnp.clip((hounsfield - low) / (high - low), 0.0, 1.0) for low, high in windows]
    return jnp.stack(channels, axis=-1).astype(dtype)


def shifted(key: jax.Array, voxels: jax.Array, most: int, fill: float) -> jax.Array:
    """`[B, X, Y, Z]`, each row moved by up to `most` voxels along each axis; what was outside is `fill`. The same key moves a
    mask as its volume."""
    padded = jnp.pad(voxels, ((0, 0), *((most, most),) * 3), constant_values=fill)
    starts = jax.random.randint(key, (len(voxels), 3), 0, 2 * most + 1)
    return jax.vmap(lambda v, s: jax.lax.dynamic_slice(v, s, voxels.shape[1:]))(padded, starts)


def shift_key(key: jax.Array) -> jax.Array:
    """Of the key of `augment`, the part that draws the shift."""
    return jax.random.split(key, 4)[0]


def augment(key: jax.Array, volume: jax.Array, options: AugmentConfig) -> jax.Array:
    """Random shift (voxels, filled with air), intensity scale and offset (HU), noise (HU). HU in, float32 HU out.

    Never a flip: reports name sides.
    """
    batch = volume.shape[0]
    _, scale_key, offset_key, noise_key = jax.random.split(key, 4)
    hounsfield = volume.astype(jnp.float32)
    if options.shift:
        hounsfield = shifted(shift_key(key), hounsfield, options.shift, AIR_HU)
    per_patient = (batch, 1, 1, 1)
    if options.scale:
        factor = 1 + options.scale * jax.random.uniform(scale_key, per_patient, minval=-1, maxval=1)
        hounsfield = (hounsfield - AIR_HU) * factor + AIR_HU
    if options.offset:
        hounsfield += options.offset * jax.random.uniform(offset_key, per_patient, minval=-1, maxval=1)
    if options.noise:
        hounsfield += options.noise * jax.random.normal(noise_key, hounsfield.shape)
    return hounsfield


def at_least(voxels: jax.Array, size: tuple[int, int, int], fill: float) -> jax.Array:
    """`[B, X, Y, Z]` with `fill` laid around it evenly where it is smaller than `size`."""
    lacking = [max(wanted - side, 0) for side, wanted in zip(voxels.shape[1:], size, strict=True)]
    if not any(lacking):
        return voxels
    return jnp.pad(voxels, ((0, 0), *((lack // 2, lack - lack // 2) for lack in lacking)), constant_values=fill)


def streams(key: jax.Array, names: tuple[str, ...]) -> dict[str, jax.Array]:
    """A key for each name."""
    fixed = dict(zip(STREAMS, jax.random.split(key, len(STREAMS)), strict=True))
    return {
        name: fixed[name] if name in fixed else jax.random.fold_in(key, zlib.crc32(name.encode())) for name in names
    }


def sentences_as_tokens(batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """What stands for the text fields of a report of which only the features of its sentences are read: one token each.

    `token_mask` and `sentence_index` [B, S], and `sentence_features` [B, S, e]: of the first wording of the sentences that
    the alignment adds to a batch.
    """
    return features_as_tokens(batch["sentences"][:, :, 0], batch["sentence_lengths"][..., 0] > 0)


def features_as_tokens(features: jax.Array, there: jax.Array) -> dict[str, jax.Array]:
    """The same, of the features of sentences [B, S, e] and which there are [B, S]."""
    numbers = jnp.where(there, jnp.arange(1, there.shape[1] + 1), 0)
    return {"token_mask": there, "sentence_index": numbers, SENTENCE_FEATURES: features}


def model_inputs(
    batch: dict[str, jax.Array], key: jax.Array, model: MG3D, *, special: dict[str, int], train: bool
) -> dict[str, Any]:
    """Batch -> what `model` takes: windowed (in training: augmented) volume, report, and what the objectives draw.

    Args:
        special: ids of the special tokens by role ("[PAD]", "[MASK]", ...), whatever the tokenizer calls them.

    Returns:
        `volume` [B, X, Y, Z, C]; `report`, the text fields [B, T], or what `sentences_as_tokens` puts in their place; the
        fields of `batch.OF_RECORDS` that are read, moved as the volume is; and what the `draw` of each objective and task
        that is on gives.
    """
    context = dataclasses.replace(model.context, special=Group(special), train=train)
    batch = dict(batch)
    for name, fill in (
        ("volume", AIR_HU),
        ("mask", UNKNOWN_LABEL),
    ):  # smaller than the tower's: laid in the middle of air
        if name in batch:
            batch[name] = at_least(batch[name], context.model.volume_size, fill)
    keys = streams(key, ("augment", *(one.name for one in model.on)))
    volume = batch["volume"]
    if train:
        volume = augment(keys["augment"], volume, context.data.augment)
    inputs: dict[str, Any] = {"volume": window(volume, context.data.windows)}
    if context.model.report_input == "sentences":
        batch = batch | sentences_as_tokens(batch)
    inputs["report"] = {name: batch[name] for name in (*TEXT_FIELDS, SENTENCE_FEATURES) if name in batch}
    for name in record_fields(model.on):  # of voxels, all of them
        inputs[name] = batch[name]
        if train and (most := context.data.augment.shift):
            inputs[name] = shifted(shift_key(keys["augment"]), batch[name], most, UNKNOWN_LABEL)
    for one in model.on:
        drawn = one.objective.draw(keys[one.name], batch, one.options, context) if one.objective.draw else {}
        if taken := sorted(drawn.keys() & inputs.keys()):
            raise UserError(
                f"the objective {one.name!r} draws {taken}, which are inputs already: give them other names"
            )
        inputs |= drawn
    return inputs


def dummy_inputs(model: MG3D, batch_size: int = 1) -> dict[str, Any]:
    """Zeros of the shapes that the model takes; enough to trace it."""
    batch = abstract_batch(model.on, model.context, batch_size)
    special = dict.fromkeys(SPECIAL_TOKENS, 0)  # shapes do not depend on them
    inputs = jax.eval_shape(lambda b: model_inputs(b, jax.random.key(0), model, special=special, train=False), batch)
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), inputs)

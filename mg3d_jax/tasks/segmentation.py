"""Segmentation: classes of voxels, from crops of the records' volumes with their masks, by Dice and cross-entropy.

Crops of the size that the volume tower takes are drawn on the device, anew in every step, from the key of the step and the
number of the record: whatever the batch, the mesh and the order of its rows, a record gives the same crops in a step.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from mg3d_jax.objectives.base import Batch, Context, Features, Metrics, Objective
from mg3d_jax.objectives.pairwise import masked_mean, zero_unless
from mg3d_jax.options import key

HEAD = "segmentation_head"
SMOOTH = 1e-5  # added to both sides of the Dice ratio, as MONAI's DiceLoss does


@dataclass(frozen=True)
class SegmentationOptions:
    """Segmentation of the records' masks."""

    weight: float = key(0.0, "weight in the loss; 0: off", neutral=0.0)
    num_classes: int = key(2, "classes of the masks, background included", neutral=2)
    crops: int = key(2, "crops of model.volume_size that a step draws of every volume", neutral=2)
    foreground: float = key(
        0.5, "share of the crops around a voxel of a class that is not background, where a mask has one", neutral=0.5
    )
    flip: bool = key(False, "mirror the crops of training along each axis, at random", neutral=False)
    dice_weight: float = key(1.0, "weight of the Dice loss in this task's", neutral=1.0)
    cross_entropy_weight: float = key(1.0, "weight of the cross-entropy in this task's", neutral=1.0)
    include_background: bool = key(True, "does the background count in the Dice loss, as a class?", neutral=True)


def problems(options: SegmentationOptions, config: Any) -> list[str]:
    """Too few classes, crops or weights; a tower without a decoder."""
    found = [
        f"tasks.segmentation.{name} = {getattr(options, name)}: must be at least {least}"
        for name, least in (("num_classes", 2), ("crops", 1))
        if getattr(options, name) < least
    ]
    if not 0 <= options.foreground <= 1:
        found.append(f"tasks.segmentation.foreground = {options.foreground}: a share from 0 to 1")
    if not options.weight > 0:
        return found
    if not options.dice_weight + options.cross_entropy_weight > 0:
        found.append("tasks.segmentation.dice_weight and cross_entropy_weight are both 0: nothing would be learnt")
    if config.model.volume_encoder.tower.segmenter is None:
        kind = config.model.volume_encoder.kind
        found.append(f"model.volume_encoder.kind = {kind!r} has no decoder for tasks.segmentation: use vit or swin")
    return found


def data_problems(options: SegmentationOptions, data: Any) -> list[str]:
    """Masks of another number of classes than the head's."""
    names = list(data.mask_names)
    if len(names) == options.num_classes:
        return []
    return [
        f"the masks have {len(names)} classes, {', '.join(names)}, and tasks.segmentation.num_classes = "
        f"{options.num_classes}: set it to {len(names)}"
    ]


def draw(key: jax.Array, batch: Batch, options: SegmentationOptions, context: Context) -> dict[str, jax.Array]:
    """`crop_starts` int32 [B, K, 3], first voxels of the crops, and `crop_flips` bool [B, K, 3]: only in training."""
    keys = jax.vmap(lambda record: jax.random.split(jax.random.fold_in(key, record), options.crops))(
        batch["record_index"]
    )
    size = context.model.volume_size

    def of_record(keys: jax.Array, mask: jax.Array) -> jax.Array:
        return jax.vmap(lambda k: crop_start(k, mask, size, options))(keys)

    starts = jax.vmap(of_record)(keys, batch["mask"])
    flips = jnp.zeros(starts.shape, bool)
    if context.train and options.flip:
        flips = jax.vmap(jax.vmap(lambda k: jax.random.bernoulli(jax.random.fold_in(k, 1), shape=(3,))))(keys)
    return {"crop_starts": starts, "crop_flips": flips}


def crop_start(key: jax.Array, mask: jax.Array, size: tuple[int, int, int], options: SegmentationOptions) -> jax.Array:
    """First voxel of a crop, int32 [3]: uniform, or with probability `foreground` centred on a voxel of a class.

    The class is one of those that the mask has, each as likely as the others whatever its size; the voxel is one of it, each
    as likely. Crops stay inside of the volume, as MONAI's `RandCropByLabelClasses` has it.

    Args:
        mask: int8 [X, Y, Z], no smaller than `size`.
    """
    choice_key, class_key, voxel_key, start_key = jax.random.split(key, 4)
    last = jnp.array(mask.shape) - jnp.array(size)
    anywhere = jax.random.randint(start_key, (3,), 0, last + 1)
    classes = jnp.arange(1, options.num_classes, dtype=mask.dtype)
    counts = jax.lax.map(lambda one: jnp.sum(mask == one, dtype=jnp.int32), classes)
    chosen = jax.random.categorical(class_key, jnp.where(counts > 0, 0.0, -jnp.inf))
    number = jax.random.randint(voxel_key, (), 0, jnp.maximum(counts[chosen], 1))
    before = jnp.cumsum((mask == classes[chosen]).ravel(), dtype=jnp.int32)
    voxel = jnp.stack(jnp.unravel_index(jnp.searchsorted(before, number + 1), mask.shape))
    around = jnp.clip(voxel - jnp.array(size) // 2, 0, last)
    wanted = jax.random.bernoulli(choice_key, options.foreground) & jnp.any(counts > 0)
    return jnp.where(wanted, around, anywhere).astype(jnp.int32)


def modules(options: SegmentationOptions, context: Context) -> dict[str, nn.Module]:
    """A 1x1x1 convolution, float32 whatever the towers compute in. Its weights start at a tenth of what is usual: every class
    about as likely as the others, but none like another. From usual ones some runs of small models stay at background for
    hundreds of steps, from zeros one class of several may never be learned (docs/segmentation.md)."""
    near_zero = nn.initializers.variance_scaling(0.01, "fan_in", "truncated_normal")
    return {HEAD: nn.Dense(options.num_classes, kernel_init=nn.with_logical_partitioning(near_zero, ("embed", None)))}


def features(modules: Any, needed: Features, options: SegmentationOptions) -> Features:
    """`segmentation_logits` float32 [B, K, x, y, z, C] and `crop_mask` int8 [B, K, x, y, z]."""
    logits = modules[HEAD](needed["crop_features"].astype(jnp.float32))
    return {"segmentation_logits": logits, "crop_mask": needed["crop_mask"]}


def loss(features: Features, batch: Batch, options: SegmentationOptions) -> tuple[jax.Array, Metrics]:
    """`dice_cross_entropy` of all crops. Metrics: both parts, `dice`, the hard Dice of the crops' classes that are there,
    background left out, and `foreground`, the share of crops that have such a class."""
    logits, mask = features["segmentation_logits"], features["crop_mask"]
    known = (mask >= 0) & batch["valid"][:, None, None, None, None]
    flat = (
        logits.reshape(-1, *logits.shape[2:]),
        mask.reshape(-1, *mask.shape[2:]),
        known.reshape(-1, *mask.shape[2:]),
    )
    total, metrics = dice_cross_entropy(*flat, options)
    return total, jax.lax.stop_gradient(metrics | hard_dice(*flat))


def dice_cross_entropy(
    logits: jax.Array, mask: jax.Array, known: jax.Array, options: SegmentationOptions
) -> tuple[jax.Array, Metrics]:
    """Soft Dice loss and cross-entropy of a softmax over classes, as MONAI's `DiceCELoss(softmax=True, to_onehot_y=True)`.

    The Dice loss is the mean over crops and classes, each crop by itself; crops without a known voxel are left out. The
    cross-entropy is the mean over all known voxels.

    Args:
        logits: [n, x, y, z, C].
        mask: classes, int [n, x, y, z].
        known: bool [n, x, y, z]: what counts.
    """
    logits = zero_unless(known, logits)
    truth = zero_unless(known, jax.nn.one_hot(mask, logits.shape[-1], dtype=jnp.float32))
    logs = jax.nn.log_softmax(logits)
    cross_entropy = -jnp.sum(logs * truth) / jnp.maximum(jnp.sum(known, dtype=jnp.float32), 1.0)
    shares = zero_unless(known, jnp.exp(logs))
    space = (1, 2, 3)
    both, sizes = jnp.sum(shares * truth, space), jnp.sum(shares + truth, space)  # [n, C]
    dice = 1 - (2 * both + SMOOTH) / (sizes + SMOOTH)
    if not options.include_background:
        dice = dice[:, 1:]
    dice = masked_mean(jnp.mean(dice, axis=1), jnp.any(known, axis=space))
    total = options.dice_weight * dice + options.cross_entropy_weight * cross_entropy
    return total, {"dice_loss": dice, "cross_entropy": cross_entropy}


def hard_dice(logits: jax.Array, mask: jax.Array, known: jax.Array) -> Metrics:
    """`dice` of the most likely classes, mean over crops and classes that are there; `foreground`, the share of crops with
    one. The background is left out of both."""
    classes = jnp.arange(1, logits.shape[-1])
    truth = (mask[..., None] == classes) & known[..., None]
    found = (jnp.argmax(logits, axis=-1)[..., None] == classes) & known[..., None]
    space = (1, 2, 3)
    both, sizes, there = (jnp.sum(x, space, dtype=jnp.float32) for x in (truth & found, found, truth))
    dice = masked_mean(2 * both / jnp.maximum(sizes + there, 1.0), there > 0)
    crops = jnp.any(known, axis=space)
    return {"dice": dice, "foreground": masked_mean(jnp.any(there > 0, axis=1).astype(jnp.float32), crops)}


SEGMENTATION = Objective(
    options=SegmentationOptions,
    needs=lambda options: ("crop_features", "crop_mask"),
    loss=loss,
    features=features,
    draw=draw,
    modules=modules,
    problems=problems,
    reads=lambda options: ("mask",),
    data_problems=data_problems,
)

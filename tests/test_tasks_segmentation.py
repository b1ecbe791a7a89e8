"""The segmentation task: its loss against MONAI's, and the crops that it draws."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import random_batch, tiny_builder, tiny_config, with_plain_towers

from mg3d_jax import config as config_lib
from mg3d_jax.config import checks
from mg3d_jax.errors import UserError
from mg3d_jax.objectives.base import Context, check_data, enabled
from mg3d_jax.options import Group
from mg3d_jax.tasks.segmentation import SEGMENTATION, SegmentationOptions, crop_start
from mg3d_jax.training import inputs
from mg3d_jax.training.state import build_model

ON = {"tasks__segmentation__weight": 1.0, "objectives__alignment__weight": 0.0}


def loss_of(logits, mask, valid=None, **options):
    """The value and metrics of the task for crops [B, K, ...], and the gradient."""
    batch = {"valid": jnp.ones(len(logits), bool) if valid is None else jnp.asarray(valid)}
    options = SegmentationOptions(weight=1.0, num_classes=logits.shape[-1], **options)

    def loss(logits):
        return SEGMENTATION.loss({"segmentation_logits": logits, "crop_mask": jnp.asarray(mask)}, batch, options)

    (value, metrics), grad = jax.jit(jax.value_and_grad(loss, has_aux=True))(jnp.asarray(logits))
    return float(value), jax.device_get(metrics), np.asarray(grad)


@pytest.mark.parametrize(
    "options", [{}, {"include_background": False, "dice_weight": 0.3, "cross_entropy_weight": 2.0}]
)
def test_the_loss_is_monais(options):
    torch = pytest.importorskip("torch")
    losses = pytest.importorskip("monai.losses")
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(2, 2, 5, 4, 6, 3)).astype("f") * 3
    mask = rng.integers(0, 3, (2, 2, 5, 4, 6)).astype(np.int8)
    mask[0, 0][mask[0, 0] == 2] = 0  # a class that is not there
    value, metrics, grad = loss_of(logits, mask, **options)
    given = torch.tensor(logits.reshape(4, 5, 4, 6, 3).transpose(0, 4, 1, 2, 3), requires_grad=True)
    names = {"dice_weight": "lambda_dice", "cross_entropy_weight": "lambda_ce"}
    theirs = losses.DiceCELoss(to_onehot_y=True, softmax=True, **{names.get(k, k): v for k, v in options.items()})
    expected = theirs(given, torch.tensor(mask.reshape(4, 1, 5, 4, 6)))
    expected.backward()
    assert value == pytest.approx(expected.item(), rel=1e-5)
    theirs_grad = given.grad.numpy().transpose(0, 2, 3, 4, 1).reshape(grad.shape)
    np.testing.assert_allclose(grad, theirs_grad, rtol=1e-4, atol=1e-7)
    predicted, dices = logits.argmax(-1), []
    for crop in np.ndindex(2, 2):
        for one in (1, 2):
            found, true = predicted[crop] == one, mask[crop] == one
            dices += [2 * np.sum(found & true) / (found.sum() + true.sum())] if true.any() else []
    assert metrics["dice"] == pytest.approx(np.mean(dices), rel=1e-5) and metrics["foreground"] == 1.0


def test_what_is_unknown_does_not_count():
    """Voxels without a class, crops of them alone, and rows that only fill the batch, whatever their logits are."""
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(3, 2, 4, 4, 4, 2)).astype("f")
    mask = rng.integers(0, 2, (3, 2, 4, 4, 4)).astype(np.int8)
    unknown = mask.copy()
    unknown[..., 2:], unknown[1] = -1, -1
    bad = np.where((unknown < 0)[..., None], np.nan, logits)
    bad[2] = np.nan
    value, metrics, grad = loss_of(bad, unknown, valid=[True, True, False])
    expected, theirs, _ = loss_of(logits[:1, ..., :2, :], mask[:1, ..., :2])
    assert value == pytest.approx(expected, rel=1e-5)
    for name in theirs:
        assert metrics[name] == pytest.approx(theirs[name], rel=1e-5), name
    assert np.all(grad[1:] == 0) and np.all(grad[0][..., 2:, :] == 0) and np.any(grad[0])


def starts_of(mask, size, count=400, **options):
    options = SegmentationOptions(weight=1.0, **options)
    keys = jax.random.split(jax.random.key(0), count)
    return np.asarray(jax.jit(jax.vmap(lambda k: crop_start(k, jnp.asarray(mask), size, options)))(keys))


def test_crops_around_what_is_there():
    """With a share of 1 every crop holds a voxel of the class that was chosen, and classes of any size come as often."""
    mask, size = np.zeros((12, 9, 7), np.int8), (4, 3, 5)
    mask[0, 8, 6] = 1  # one voxel, in a corner
    mask[8:, :4, :3] = 3  # many
    starts = starts_of(mask, size, foreground=1.0, num_classes=4)
    assert np.all(starts >= 0) and np.all(starts <= np.array(mask.shape) - size)
    crops = [mask[tuple(slice(s, s + w) for s, w in zip(start, size, strict=True))] for start in starts]
    held = np.array([[np.any(crop == one) for one in (1, 2, 3)] for crop in crops])
    assert np.all(held.any(axis=1)) and not held[:, 1].any()
    assert 0.4 < held[:, 0].mean() < 0.6
    assert len(np.unique(starts[held[:, 2]], axis=0)) == 9  # around any of its voxels: 6 to 8, 0 to 2, and 0
    half = starts_of(mask, size, foreground=0.5, num_classes=2)
    corner = np.all(half == [0, 6, 2], axis=1)  # the only crop with class 1: half, and 1 of 9 * 7 * 3 of the others
    assert 0.4 < corner.mean() < 0.6


@pytest.mark.parametrize("options", [{"foreground": 0.0}, {"foreground": 1.0}])
def test_crops_anywhere(options):
    """Without a share for it, or without anything there: every place comes as often."""
    mask = np.full((6, 5, 4), -1 if options["foreground"] else 1, np.int8)
    starts = starts_of(mask, (4, 4, 4), 600, **options)
    places, counts = np.unique(starts, axis=0, return_counts=True)
    assert len(places) == 3 * 2 * 1 and counts.min() > 60


def model_and_batch(**overrides):
    builder = with_plain_towers(tiny_builder(**ON, **overrides))
    config = config_lib.typed(builder)
    checks.validate(config)
    return build_model(config, 400), random_batch(config), config


def crops_of(model, batch, seed=0, train=False):
    names = ("crops", "crop_mask", "crop_starts", "crop_flips", "volume", "mask")

    def compute(batch):
        special = dict.fromkeys(("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"), 0)
        given = inputs.model_inputs(batch, jax.random.key(seed), model, special=special, train=train)
        return model.apply({"params": {"logit_scale": 0.0}}, given, names, method="compute")

    return jax.device_get(jax.jit(compute)(batch))


def test_crops_are_cut_from_volume_and_mask_alike():
    """Of a grid larger along two axes and smaller along one, mirrored in training; the same for a record in every batch."""
    model, batch, _ = model_and_batch(data__grid=(20, 12, 18), tasks__segmentation__flip=True)
    found = crops_of(model, batch, train=True)
    assert found["crops"].shape == (8, 2, 16, 16, 16, 1) and found["volume"].shape == (8, 20, 16, 18, 1)
    assert np.all(found["mask"][:, :, :2] == -1) and np.all(found["volume"][:, :, -2:] == 0)  # around it: unknown, air
    assert found["crop_flips"].any() and not found["crop_flips"].all()
    for row, k in np.ndindex(8, 2):
        at = tuple(slice(start, start + 16) for start in found["crop_starts"][row, k])
        axes = np.flatnonzero(found["crop_flips"][row, k])
        np.testing.assert_array_equal(found["crops"][row, k], np.flip(found["volume"][row][at], axes))
        np.testing.assert_array_equal(found["crop_mask"][row, k], np.flip(found["mask"][row][at], axes))
    order = np.array([3, 1, 0, 2, 7, 6, 5, 4])
    mixed = crops_of(model, {name: array[order] for name, array in batch.items()})
    np.testing.assert_array_equal(mixed["crop_starts"], found["crop_starts"][order])
    assert not mixed["crop_flips"].any()  # not in training
    assert np.any(crops_of(model, batch, seed=1)["crop_starts"] != found["crop_starts"])


def test_what_is_impossible():
    for overrides, says in (
        ({"tasks__segmentation__num_classes": 1}, "must be at least 2"),
        ({"tasks__segmentation__crops": 0}, "must be at least 1"),
        ({"tasks__segmentation__foreground": 1.5}, "a share from 0 to 1"),
        ({"tasks__segmentation__dice_weight": 0.0, "tasks__segmentation__cross_entropy_weight": 0.0}, "both 0"),
        ({"data__grid": (32, 32)}, "three positive numbers"),
        ({"data__grid": (32, 32, 32), "objectives__alignment__weight": 1.0}, "objectives.alignment read"),
    ):
        with pytest.raises(UserError, match=says):
            checks.validate(tiny_config(**ON | overrides))

    class Masks:
        mask_names = ("background", "left", "right")

    config = tiny_config(**ON)
    with pytest.raises(UserError, match=r"3 classes, background, left, right, .*num_classes = 2: set it to 3"):
        check_data(enabled(config.objectives, config.tasks), Masks())
    assert Context(config.data, config.model, 400, Group({})).train is False

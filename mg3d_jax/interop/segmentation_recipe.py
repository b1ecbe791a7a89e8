"""What the segmentation recipes of `configs/downstream` have in common: crops, decoder, rates and the held-out Dice."""

from __future__ import annotations

from ml_collections import ConfigDict

from mg3d_jax.interop import finetune

HEADS = ("segmentation_decoder", "segmentation_head")
SMALL_CROP = (24, 24, 16)  # voxels, of miniatures on a grid of `finetune.SMALL_SIZE`


def begin(
    arg: str,
    name: str,
    *,
    num_classes: int,
    grid: tuple[int, int, int],
    crop: tuple[int, int, int],
    windows: finetune.Windows,
) -> ConfigDict:
    """The unlocked configuration of a recipe that segments.

    Args:
        arg, name, windows: as for `finetune.begin`.
        num_classes: of the masks, background included.
        grid: voxels of the prepared volumes.
        crop: voxels of the crops that it trains on, and of the windows that it predicts with.
    """
    small = finetune.SMALL in arg.split(",")
    config = finetune.begin(arg, name, volume_size=crop, windows=windows, heads=HEADS)
    finetune.tokens_alone(config)
    config.data.grid = finetune.SMALL_SIZE if small else grid
    if small:
        config.model.volume_size = SMALL_CROP
        config.model.segmentation_decoder.width = 4
        if config.data.windows == ((-1000.0, 1000.0),):
            config.data.windows = windows
    config.data.batch_size = 4 if small else 8
    config.tasks.segmentation.update({"weight": 1.0, "num_classes": num_classes, "crops": 2, "foreground": 0.5})
    config.tasks.segmentation.include_background = False
    # As SwinUNETR (arXiv 2201.01266) and VoCo (arXiv 2402.17300) are fine-tuned.
    config.optimizer.update({"learning_rate": 3e-3 if small else 3e-4, "weight_decay": 1e-5, "b2": 0.999})
    if small:  # in a few hundred steps the head, a few numbers, would else hardly leave where it started (docs/segmentation.md)
        config.optimizer.learning_rate_multipliers = (("segmentation_head/.*", 10.0), (".*", 1.0))
    config.training.steps = 300 if small else 20_000
    config.evaluations.segmentation.every = 0
    return config

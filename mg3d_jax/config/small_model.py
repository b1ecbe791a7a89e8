"""The sizes of the quickstart and of the scaled-down twin of the pre-training config."""

from __future__ import annotations

from ml_collections import ConfigDict


def use_small_model(config: ConfigDict) -> None:
    """48 x 48 x 32 voxels, two layers, float32, 32 patients: what two CPU cores train in minutes."""
    config.model.volume_size = (48, 48, 32)
    config.model.volume_encoder.update({
        "preset": "pico", "patch_size": (12, 12, 8), "positions": "learned", "layer_scale": 0.1, "pooling": "flatten",
    })  # fmt: skip
    config.model.report_encoder.preset = "pico"
    config.model.update({"projection_dim": 128, "dtype": "float32", "remat": "none"})
    config.data.batch_size = 32
    config.data.windows = ((-1000.0, -400.0), (-160.0, 240.0), (200.0, 1200.0))  # lung, mediastinum, calcification
    config.optimizer.update({"learning_rate": 1e-3, "b2": 0.999})
    config.schedule.warmup_percent = 5.0

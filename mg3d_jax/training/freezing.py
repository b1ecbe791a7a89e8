"""Which parameters `model.*_encoder.frozen_layers` freezes: whole arrays, and parts of arrays that stack layers.

The model itself runs frozen layers without gradient and dropout (`models.transformer.Stack`). What is left to the
optimizer is that nothing else moves them: weight decay and momentum must be kept from them, layer by layer.
"""

from __future__ import annotations

import numpy as np
from ml_collections import ConfigDict

from mg3d_jax import presets

Rows = tuple[tuple[str, float | np.ndarray], ...]


def trained_rows(config: ConfigDict) -> Rows:
    """`(regex over whole parameter names, share)` for `training.optimizer.multipliers`.

    The share is 0.0 where everything is frozen. Where an array stacks layers it is float32 [layers, 1, ...], 0 at the
    frozen ones and 1 at the others, and broadcasts to the array. Parameters that no row matches are trained.
    """
    model, rows = config.model, []
    for encoder, preset in (
        ("volume_encoder", presets.volume_preset(model.volume_encoder.preset)),
        ("report_encoder", presets.report_preset(model.report_encoder.preset)),
    ):
        frozen = model[encoder].frozen_layers
        if frozen == -1:
            rows.append((f"{encoder}/.*", 0.0))
        elif frozen and isinstance(preset, presets.SwinPreset):
            rows += [(f"{encoder}/{name}(/.*)?", 0.0) for name in _swin_modules(preset, frozen)]
        elif frozen:
            layers = (np.arange(preset.depth) >= frozen).astype(np.float32)
            rows += [
                (f"{encoder}/(?!(stack|norm|pool|flatten)/).*", 0.0),  # before the first layer
                (f"{encoder}/stack/blocks/.*/kernel", layers[:, None, None]),
                (f"{encoder}/stack/blocks/.*/(bias|scale)", layers[:, None]),
            ]
    return tuple(rows)


def _swin_modules(preset: presets.SwinPreset, frozen: int) -> list[str]:
    """What `models.swin.SwinEncoder` freezes with its first `frozen` blocks."""
    names, layer = ["patch_embedding", "mask_token"], 0
    for stage, depth in enumerate(preset.depths):
        if layer < frozen:
            names.append(f"convolution_{stage}")
        names += [f"stage_{stage}_block_{block}" for block in range(depth) if layer + block < frozen]
        layer += depth
        if layer <= frozen:
            names.append(f"merging_{stage}")
    return names

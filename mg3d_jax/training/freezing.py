"""Which parameters `model.*_encoder.frozen_layers` freezes: whole arrays, and parts of arrays that stack layers.

The model itself runs frozen layers without gradient and dropout (`models.transformer.Stack`). What is left to the
optimizer is that nothing else moves them: weight decay and momentum must be kept from them, layer by layer.
"""

from __future__ import annotations

import numpy as np

from mg3d_jax.config import Config

Rows = tuple[tuple[str, float | np.ndarray], ...]


def trained_rows(config: Config) -> Rows:
    """`(regex over whole parameter names, share)` for `training.optimizer.multipliers`.

    The share is 0.0 where everything is frozen. Where an array stacks layers it is float32 [layers, 1, ...], 0 at the
    frozen ones and 1 at the others, and broadcasts to the array. Parameters that no row matches are trained.
    """
    rows: list[tuple[str, float | np.ndarray]] = []
    encoders = {"volume_encoder": config.model.volume_encoder, "report_encoder": config.model.report_encoder}
    for name, encoder in encoders.items():
        if encoder.frozen_layers == -1:
            rows.append((f"{name}/.*", 0.0))
        elif encoder.frozen_layers:
            frozen = encoder.tower.frozen(encoder.sizes, encoder.frozen_layers)
            rows += [(f"{name}/{pattern}", share) for pattern, share in frozen]
    return tuple(rows)

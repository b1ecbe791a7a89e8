"""What depends on the depth at which a parameter stands: freezing (`model.*_encoder.frozen_layers`) and layer-wise decay of
the learning rate (`optimizer.layer_decay`), of whole arrays and of parts of arrays that stack layers.

The model itself runs frozen layers without gradient and dropout (`models.transformer.Stack`). What is left to the
optimizer is that nothing else moves them: weight decay and momentum must be kept from them, layer by layer.
"""

from __future__ import annotations

import numpy as np

from mg3d_jax.config import Config
from mg3d_jax.config.parts import EncoderConfig

Rows = tuple[tuple[str, float | np.ndarray], ...]


def trained_rows(config: Config) -> Rows:
    """`(regex over whole parameter names, share)` for `training.optimizer.multipliers`.

    The share is 0.0 where everything is frozen. Where an array stacks layers it is float32 [layers, 1, ...], 0 at the
    frozen ones and 1 at the others, and broadcasts to the array. Parameters that no row matches are trained.
    """
    rows: list[tuple[str, float | np.ndarray]] = []
    for name, encoder in _encoders(config).items():
        if encoder.frozen_layers == -1:
            rows.append((f"{name}/.*", 0.0))
        elif encoder.frozen_layers:
            frozen = encoder.tower.frozen(encoder.sizes, encoder.frozen_layers)
            rows += [(f"{name}/{pattern}", share) for pattern, share in frozen]
    return tuple(rows)


def layer_decay_rows(config: Config) -> Rows:
    """Factors of `optimizer.layer_decay` in the form of `trained_rows`, for both towers; none where it is 1.

    Of a tower with L layers the last one has the factor decay, the first decay^L, what comes before the layers
    decay^(L + 1); what comes behind them, and everything outside of the towers, has 1 (He et al. 2022, as BEiT's).
    """
    decay = config.optimizer.layer_decay
    if decay == 1:
        return ()
    rows: list[tuple[str, float | np.ndarray]] = []
    for name, encoder in _encoders(config).items():
        for layers in range(encoder.sizes.depth + 1):
            # Once for each number of layers with which the parameter would be frozen: the more, the nearer to the input.
            for pattern, share in encoder.tower.frozen(encoder.sizes, layers):
                rows.append((f"{name}/{pattern}", np.where(np.asarray(share) == 0, np.float32(decay), np.float32(1))))
    return tuple(rows)


def _encoders(config: Config) -> dict[str, EncoderConfig]:
    return {"volume_encoder": config.model.volume_encoder, "report_encoder": config.model.report_encoder}

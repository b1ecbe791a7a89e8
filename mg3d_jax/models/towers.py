"""The two encoders that a configuration names.

Both kinds of volume encoder are called alike: `(volume, visible, train=) -> {"tokens", "pooled", ...}`, see their
docstrings. What differs between them, masked passes included, stays inside them.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
from ml_collections import ConfigDict

from mg3d_jax import presets
from mg3d_jax.models.report_encoder import ReportEncoder
from mg3d_jax.models.swin import SwinEncoder
from mg3d_jax.models.volume_encoder import VolumeEncoder


def volume_encoder(config: ConfigDict, attention_backend: str = "xla", **options: Any) -> nn.Module:
    """The ViT or Swin of `config.model.volume_encoder`, for volumes of `config.model.volume_size` and the windows of
    `config.data`. `options` are further fields of the module (name, dropout, ...)."""
    model, encoder = config.model, config.model.volume_encoder
    preset = presets.volume_preset(encoder.preset)
    common = {
        "channels": len(config.data.windows),
        "pooling": encoder.pooling,
        "dropout": encoder.dropout,
        "dtype": model.dtype,
        "remat": model.remat,
        "frozen_layers": encoder.frozen_layers,
    }
    if isinstance(preset, presets.SwinPreset):
        swin = {
            "width": preset.embed,
            "depths": preset.depths,
            "num_heads": preset.stage_heads,
            "window": preset.window,
            "patch_size": preset.patch_size,
            "merging": encoder.merging,
            "residual_convolutions": preset.residual_convolutions,
        }
        return SwinEncoder(**swin | common | options)
    vit = {
        "width": preset.width,
        "depth": preset.depth,
        "num_heads": preset.num_heads,
        "mlp_ratio": preset.mlp_ratio,
        "patch_size": tuple(encoder.patch_size),
        "volume_size": tuple(model.volume_size),
        "stem": encoder.stem,
        "positions": encoder.positions,
        "num_registers": encoder.num_registers,
        "qk_norm": encoder.qk_norm,
        "layer_scale": encoder.layer_scale or None,
        "norm_epsilon": encoder.norm_epsilon,
        "exact_gelu": encoder.exact_gelu,
        "attention_backend": attention_backend,
    }
    return VolumeEncoder(**vit | common | options)


def report_encoder(
    config: ConfigDict, vocab_size: int, attention_backend: str = "xla", **options: Any
) -> ReportEncoder:
    """The BERT-type encoder of `config.model.report_encoder`. `options` are further fields of the module."""
    model, encoder = config.model, config.model.report_encoder
    preset = presets.report_preset(encoder.preset)
    fields = {
        "vocab_size": vocab_size,
        "width": preset.width,
        "depth": preset.depth,
        "num_heads": preset.num_heads,
        "mlp_dim": preset.mlp_dim,
        "max_positions": encoder.max_positions,
        "type_vocab": preset.type_vocab,
        "norm_epsilon": preset.norm_epsilon,
        "dropout": encoder.dropout,
        "dtype": model.dtype,
        "remat": model.remat,
        "attention_backend": attention_backend,
        "frozen_layers": encoder.frozen_layers,
    }
    return ReportEncoder(**fields | options)

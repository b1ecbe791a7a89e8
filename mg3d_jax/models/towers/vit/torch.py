"""Parameters of `VolumeEncoder` as the state dict of its PyTorch counterpart in `interop/torch_template`."""

from __future__ import annotations

from typing import Any

import numpy as np

from mg3d_jax.config.parts import ModelConfig
from mg3d_jax.models.patches import halvings
from mg3d_jax.models.positions import Grid, sincos
from mg3d_jax.models.towers.base import Params, Weights
from mg3d_jax.models.towers.weights import torch_state


def to_torch(params: Params, model: ModelConfig) -> Weights:
    """The kernel `[px * py * pz * C, out]` of a patch embedding becomes `[out, C, px, py, pz]` of a convolution."""
    options = model.volume_encoder.options
    patch = tuple(options.patch_size)
    stem = params["patch_embedding"]
    if options.stem == "conv":
        convolutions = {
            f"patch_embedding.convs.{level}.weight": convolution(stem[f"conv_{level}"]["kernel"], stride)
            for level, stride in enumerate(halvings(patch))
        }
    else:
        convolutions = {"patch_embedding.weight": convolution(stem["kernel"], patch)}
    state = torch_state(params) | convolutions
    if options.positions == "sincos":
        state["positions"] = sincos(model.token_grid(), model.volume_encoder.sizes.width)
    return state


def convolution(kernel: np.ndarray, patch: Grid) -> np.ndarray:
    """`[px * py * pz * C, out]` (the order of `patchify`) -> `[out, C, px, py, pz]` of `Conv3d(stride=patch)`."""
    return kernel.reshape(*patch, -1, kernel.shape[-1]).transpose(4, 3, 0, 1, 2)


def torch_arguments(params: Params, model: ModelConfig) -> dict[str, Any]:
    """Its part of `MG3DConfig`."""
    encoder, sizes = model.volume_encoder, model.volume_encoder.sizes
    strides = halvings(tuple(encoder.options.patch_size)) if encoder.options.stem == "conv" else []
    stem = params["patch_embedding"]
    return {
        "patch_size": list(encoder.options.patch_size),
        "stem": encoder.options.stem,
        "stem_strides": [list(stride) for stride in strides],
        "stem_channels": [int(stem[f"conv_{level}"]["bias"].shape[0]) for level in range(len(strides))],
        "positions": encoder.options.positions,
        "pooling": encoder.pooling,
        "num_registers": encoder.options.num_registers,
        "qk_norm": encoder.options.qk_norm,
        "layer_scale": bool(encoder.options.layer_scale),
        "exact_gelu": encoder.options.exact_gelu,
        "volume_norm_eps": encoder.options.norm_epsilon,
        "volume_width": sizes.width,
        "volume_depth": sizes.depth,
        "volume_heads": sizes.num_heads,
        "volume_mlp_dim": sizes.mlp_dim,
    }

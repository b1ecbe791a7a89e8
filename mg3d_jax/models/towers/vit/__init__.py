"""The 3D vision transformer as a tower: presets, options, freezing, weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from mg3d_jax.models.patches import patch_grid
from mg3d_jax.models.positions import interpolate
from mg3d_jax.models.segmentation import UNETR_WIDTH, UnetrDecoder
from mg3d_jax.models.towers.base import Form, Grid, Params, Sizes, Tower, frozen_stack
from mg3d_jax.models.towers.vit.encoder import VolumeEncoder
from mg3d_jax.models.towers.vit.monai import from_monai, obstacles, to_unetr, to_vit
from mg3d_jax.models.towers.vit.torch import to_torch, torch_arguments
from mg3d_jax.options import choice, key

# `ti` to `g` follow the ViT literature (Dosovitskiy et al. 2021; Touvron et al. 2021; Zhai et al. 2022 for g); `pico` and
# `nano` are small enough for CPU tests and the quickstart.
PRESETS: dict[str, Sizes] = {
    "zepto": Sizes(32, 2, 2, 128),
    "atto": Sizes(64, 2, 2, 256),
    "femto": Sizes(96, 2, 3, 384),
    "pico": Sizes(128, 2, 4, 512),
    "nano": Sizes(128, 4, 4, 512),
    "micro": Sizes(192, 2, 6, 768),
    "ti": Sizes(192, 12, 3, 768),
    "s": Sizes(384, 12, 6, 1536),
    "b": Sizes(768, 12, 12, 3072),
    "l": Sizes(1024, 24, 16, 4096),
    "h": Sizes(1280, 32, 16, 5120),
    "g": Sizes(1408, 40, 16, 6144),
}


@dataclass(frozen=True)
class VitOptions:
    """Of a ViT."""

    patch_size: tuple[int, int, int] = key((16, 16, 16), "voxels x, y, z of a patch")
    stem: str = key("linear", "how patches are embedded: linear, or conv: strided convolutions")
    positions: str = key("sincos", "learned or sincos")
    num_registers: int = key(0, "register tokens")
    qk_norm: bool = key(False, "are queries and keys normalised?")
    layer_scale: float = key(0.0, "initial scale of the residual branches; 0: none")
    norm_epsilon: float = key(1e-6, "MONAI's ViT has 1e-5")
    exact_gelu: bool = key(False, "the error function, as MONAI's, in place of the tanh form")


def _build(model: Any, channels: int, attention_backend: str = "xla", **fields: Any) -> VolumeEncoder:
    encoder, options = model.volume_encoder, model.volume_encoder.options
    preset = PRESETS[encoder.preset]
    given = {
        "width": preset.width,
        "depth": preset.depth,
        "num_heads": preset.num_heads,
        "mlp_ratio": preset.mlp_ratio,
        "patch_size": tuple(options.patch_size),
        "volume_size": tuple(model.volume_size),
        "channels": channels,
        "stem": options.stem,
        "positions": options.positions,
        "num_registers": options.num_registers,
        "qk_norm": options.qk_norm,
        "layer_scale": options.layer_scale or None,
        "norm_epsilon": options.norm_epsilon,
        "exact_gelu": options.exact_gelu,
        "pooling": encoder.pooling,
        "dropout": encoder.dropout,
        "dtype": model.dtype,
        "remat": model.remat,
        "frozen_layers": encoder.frozen_layers,
        "attention_backend": attention_backend,
    }
    return VolumeEncoder(**given | fields)


def _segmenter(model: Any) -> UnetrDecoder:
    patch, width = _token_cell(model.volume_encoder), model.segmentation_decoder.width or UNETR_WIDTH
    return UnetrDecoder(patch, width, dtype=model.dtype, remat=model.remat)


def _token_cell(encoder: Any) -> Grid:
    x, y, z = encoder.options.patch_size
    return x, y, z


def _problems(encoder: Any, model: Any) -> list[str]:
    options = encoder.options
    problems = [
        *choice("model.volume_encoder.stem", options.stem, ("linear", "conv")),
        *choice("model.volume_encoder.positions", options.positions, ("learned", "sincos")),
    ]
    if len(options.patch_size) != 3 or min(options.patch_size) < 1:
        problems.append(f"model.volume_encoder.patch_size = {options.patch_size}: give three positive numbers")
    return problems


def _at_volume_size(fields: dict[str, Any], params: Params, size: Grid) -> tuple[dict[str, Any], Params]:
    """Learned positions are interpolated."""
    if fields["volume_size"] == size:
        return fields, params
    old, new = (patch_grid(volume, fields["patch_size"]) for volume in (fields["volume_size"], size))
    params = dict(params)
    if "positions" in params:
        params["positions"] = np.asarray(interpolate(params["positions"], old, new))
    return fields | {"volume_size": size}, params


VIT = Tower(
    options=VitOptions,
    presets=PRESETS,
    build=_build,
    frozen=lambda preset, layers: frozen_stack(preset.depth, layers),
    token_cell=_token_cell,
    poolings=("attention", "mean", "flatten"),
    problems=_problems,
    module=VolumeEncoder,
    forms={
        "monai-vit": Form(
            help="MONAI's ViT, or the one inside UNETR",
            convert=from_monai,
            root="patch_embedding.position_embeddings",
            arguments={
                "--volume-size": {
                    "type": int,
                    "nargs": 3,
                    "required": True,
                    "metavar": ("X", "Y", "Z"),
                    "help": "its img_size",
                },
                "--heads": {"type": int, "required": True, "dest": "num_heads", "help": "its num_heads"},
                "--patch-size": {
                    "type": int,
                    "nargs": 3,
                    "metavar": ("X", "Y", "Z"),
                    "help": "its patch_size; needed for proj_type='perceptron' only",
                },
            },
        )
    },
    fresh=("pool/", "flatten/"),
    at_volume_size=_at_volume_size,
    to_torch=to_torch,
    torch_arguments=torch_arguments,
    segmenter=_segmenter,
    to_monai_network=to_unetr,
    to_monai_encoder=to_vit,
    monai_obstacles=obstacles,
)

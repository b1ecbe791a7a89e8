"""Weights of MONAI's `SwinUNETR` (MG-3D, VoCo, MONAI releases) -> parameters of `SwinEncoder`, and back.

Only the encoder, `swinViT`, is taken; the U-Net around it is dropped and reported. Width, depths, window, channels and
the V2 convolutions are read from the weights. The order of patch merging leaves no trace in them and must be said.
A model that was trained to segment goes back as a whole.
"""

from __future__ import annotations

from math import prod
from typing import Any

import numpy as np

from mg3d_jax.errors import UserError
from mg3d_jax.models.towers.base import Imported, MonaiNetwork, Params, Weights
from mg3d_jax.models.towers.segmentation_weights import SWIN_UNETR_ROWS, decoder_to_monai
from mg3d_jax.models.towers.weights import StrictWeights, dense_params, norm_params, split_qkv

UNUSED = (r"(encoder|decoder)\d+\.", r"out\.", r"layers\d\.0\.blocks\.\d+\.attn\.relative_position_index$")
PREFIXES = ("swinViT.", "encoder.swinViT.", "backbone.swinViT.", "swin_vit.", "encoder.")
STAGES = (1, 2, 3, 4)


def from_monai(weights: Weights, source: str, merging: str = "merging") -> Imported:
    """The encoder of a SwinUNETR, or its `swinViT` alone.

    Args:
        merging: MONAI's `downsample`: "merging" (SwinUNETR's default) or "mergingv2".

    Raises:
        UserError: missing, unknown or misshapen keys; all of them named.
    """
    weights = _encoder_keys(weights)
    encoder = _sizes(source, weights) | {"merging": merging}
    strict = StrictWeights(weights, source)
    width, patch, channels = encoder["width"], encoder["patch_size"], encoder["channels"]
    kernel = strict.take("patch_embed.proj.weight", (width, channels, *patch))
    bias = strict.take("patch_embed.proj.bias", (width,))
    params: dict[str, Any] = {
        "patch_embedding": {"kernel": kernel.transpose(2, 3, 4, 1, 0).reshape(-1, width), "bias": bias}
    }
    for index, stage in enumerate(STAGES):
        channels = width * 2**index
        for block in range(encoder["depths"][index]):
            prefix = f"layers{stage}.0.blocks.{block}"
            params[f"stage_{index}_block_{block}"] = _block(strict, prefix, channels, encoder, index)
        prefix = f"layers{stage}.0.downsample"
        params[f"merging_{index}"] = {
            "norm": norm_params(strict, f"{prefix}.norm", 8 * channels),
            "reduction": dense_params(strict, f"{prefix}.reduction", 8 * channels, 2 * channels, bias=False),
        }
        if encoder["residual_convolutions"]:
            params[f"convolution_{index}"] = {
                f"conv_{number}": strict.take(
                    f"layers{stage}c.0.layer.conv{number}.conv.weight", (channels, channels, 3, 3, 3)
                ).transpose(2, 3, 4, 1, 0)
                for number in (1, 2)
            }
    unused = strict.ignore(*UNUSED)
    strict.finish()
    return Imported(encoder, params, unused)


def _encoder_keys(weights: Weights) -> Weights:
    """Strips what stands before `patch_embed.proj.weight`, and renames the MLPs of weights older than MONAI 0.9."""
    for prefix in PREFIXES:
        if f"{prefix}patch_embed.proj.weight" in weights:
            weights = {key.removeprefix(prefix): array for key, array in weights.items()}
            break
    renamed = {".mlp.fc1.": ".mlp.linear1.", ".mlp.fc2.": ".mlp.linear2."}
    result = {}
    for key, array in weights.items():
        for old, new in renamed.items():
            key = key.replace(old, new)
        result[key] = array
    return result


def _sizes(source: str, weights: Weights) -> dict[str, Any]:
    kernel = weights.get("patch_embed.proj.weight")
    if kernel is None:
        raise UserError(f"{source}: no swinViT.patch_embed.proj.weight; this is not a SwinUNETR.")
    if kernel.ndim != 5:
        raise UserError(f"{source}: a {kernel.ndim - 2}D model; only 3D ones can be used.")
    depths, heads = [], []
    for stage in STAGES:
        blocks = {key.split(".")[3] for key in weights if key.startswith(f"layers{stage}.0.blocks.")}
        table = weights.get(f"layers{stage}.0.blocks.0.attn.relative_position_bias_table")
        if table is None:
            raise UserError(f"{source}: stage {stage} has no window attention (layers{stage}.0.blocks.0).")
        depths.append(len(blocks))
        heads.append(table.shape[1])
    hidden = weights.get("layers1.0.blocks.0.mlp.linear1.weight", np.zeros((4 * kernel.shape[0], 0))).shape[0]
    return {
        "width": kernel.shape[0],
        "depths": tuple(depths),
        "num_heads": tuple(heads),
        "window": _window(source, weights),
        "patch_size": tuple(kernel.shape[2:]),
        "channels": kernel.shape[1],
        "mlp_ratio": hidden / kernel.shape[0],
        "residual_convolutions": any(key.startswith("layers1c.") for key in weights),
    }


def _window(source: str, weights: Weights) -> tuple[int, int, int]:
    """From the stored index of relative positions where there is one, else from the bias table of a cubic window.

    In a window (a, b, c) the first voxel's index to itself is the offset (a-1, b-1, c-1), and index [0, 0] - [0, 1],
    [0, 0] - [0, c], [0, 0] - [0, b*c] are one step along each axis.
    """
    rows = weights["layers1.0.blocks.0.attn.relative_position_bias_table"].shape[0]
    index = weights.get("layers1.0.blocks.0.attn.relative_position_index")
    side = round((round(rows ** (1 / 3)) + 1) / 2)
    if index is None:
        if (2 * side - 1) ** 3 != rows:
            raise UserError(f"{source}: a bias table of {rows} rows belongs to no cubic window.")
        return side, side, side
    steps = index[0, 0] - index[0]
    last = int(np.argmax(steps != np.arange(len(steps)))) or len(steps)
    span = 2 * last - 1
    rest = steps[::last] // span  # one step along y each
    middle = int(np.argmax(rest != np.arange(len(rest)))) or len(rest)
    window = (len(steps) // (last * middle), middle, last)
    if prod(2 * extent - 1 for extent in window) != rows:
        raise UserError(f"{source}: its relative positions belong to no 3D window ({rows} rows in the bias table).")
    return window


def _block(strict: StrictWeights, prefix: str, width: int, encoder: dict[str, Any], stage: int) -> dict:
    hidden = round(width * encoder["mlp_ratio"])
    table = (prod(2 * extent - 1 for extent in encoder["window"]), encoder["num_heads"][stage])
    has_bias = f"{prefix}.attn.qkv.bias" in strict
    return {
        "attention_layer_norm": norm_params(strict, f"{prefix}.norm1", width),
        "attention": split_qkv(strict, f"{prefix}.attn.qkv", width, has_bias)
        | {
            "out": dense_params(strict, f"{prefix}.attn.proj", width, width),
            "position_bias": strict.take(f"{prefix}.attn.relative_position_bias_table", table),
        },
        "mlp_layer_norm": norm_params(strict, f"{prefix}.norm2", width),
        "mlp": {
            "up": dense_params(strict, f"{prefix}.mlp.linear1", width, hidden),
            "down": dense_params(strict, f"{prefix}.mlp.linear2", hidden, width),
        },
    }


def obstacles(model: Any) -> list[str]:
    """What of the volume encoder MONAI's `SwinUNETR` has no place for."""
    sizes = model.volume_encoder.sizes
    checks = (
        (sizes.patch_size != (2, 2, 2), f"patches of {sizes.patch_size}: its patches are 2"),
        (len(sizes.depths) != len(STAGES), f"{len(sizes.depths)} stages: it has {len(STAGES)}"),
        (len(set(sizes.window)) > 1, f"a window of {sizes.window}: give one number for all axes"),
    )
    return [text for prevents, text in checks if prevents]


def to_swin_unetr(params: Params, model: Any, channels: int) -> MonaiNetwork:
    """A model that segments as MONAI's `SwinUNETR`. `UserError` naming what it has no place for.

    Args:
        params: of the whole model. model: the model config.
    """
    encoder, head = model.volume_encoder, params["segmentation_head"]
    problems, width = obstacles(model), len(head["kernel"])
    if width != encoder.sizes.embed:
        problems.append(f"a decoder of {width} channels on a Swin of {encoder.sizes.embed}: they must be the same")
    _refuse(problems)
    decoder = decoder_to_monai(params["segmentation_decoder"], head, SWIN_UNETR_ROWS)
    own = _to_monai(params["volume_encoder"], encoder.sizes.depths, channels)
    arguments = _arguments(encoder, channels, len(head["bias"]))
    return MonaiNetwork("SwinUNETR", arguments, decoder | {f"swinViT.{name}": array for name, array in own.items()})


def to_swin_vit(params: Params, model: Any, channels: int) -> MonaiNetwork:
    """The encoder as the `swinViT` of MONAI's `SwinUNETR`. `UserError` naming what that has no place for.

    Args:
        params: of the volume encoder.
    """
    _refuse(obstacles(model))
    encoder = model.volume_encoder
    state = _to_monai(params, encoder.sizes.depths, channels)
    return MonaiNetwork("SwinUNETR", _arguments(encoder, channels, classes=2), state, part="swinViT")


def _refuse(problems: list[str]) -> None:
    if problems:
        raise UserError("MONAI's SwinUNETR cannot hold this model:\n  - " + "\n  - ".join(problems))


def _arguments(encoder: Any, channels: int, classes: int) -> dict[str, Any]:
    """Keyword arguments of `SwinUNETR`."""
    sizes = encoder.sizes
    return {
        "in_channels": channels,
        "out_channels": classes,
        "feature_size": sizes.embed,
        "depths": list(sizes.depths),
        "num_heads": list(sizes.stage_heads),
        "window_size": sizes.window[0],
        "downsample": encoder.options.merging,
        "use_v2": sizes.residual_convolutions,
    }


def _to_monai(params: Params, depths: tuple[int, ...], channels: int) -> Weights:
    """The inverse of `from_monai`, for patches of 2."""
    embedding = params["patch_embedding"]
    kernel = embedding["kernel"].reshape(2, 2, 2, channels, -1).transpose(4, 3, 0, 1, 2)
    state = {"patch_embed.proj.weight": kernel, "patch_embed.proj.bias": embedding["bias"]}
    for index, (stage, depth) in enumerate(zip(STAGES, depths, strict=True)):
        for block in range(depth):
            own = _block_to_monai(params[f"stage_{index}_block_{block}"])
            state |= {f"layers{stage}.0.blocks.{block}.{name}": array for name, array in own.items()}
        merging, prefix = params[f"merging_{index}"], f"layers{stage}.0.downsample"
        state |= _norm_to_monai(f"{prefix}.norm", merging["norm"])
        state[f"{prefix}.reduction.weight"] = merging["reduction"]["kernel"].T
        for name, array in params.get(f"convolution_{index}", {}).items():
            key = f"layers{stage}c.0.layer.{name.replace('_', '')}.conv.weight"
            state[key] = array.transpose(4, 3, 0, 1, 2)
    return state


def _block_to_monai(params: Params) -> Weights:
    attention, mlp = params["attention"], params["mlp"]
    parts = [attention[name] for name in ("query", "key", "value")]
    dense = {"attn.proj": attention["out"], "mlp.linear1": mlp["up"], "mlp.linear2": mlp["down"]}
    return {
        "attn.qkv.weight": np.concatenate([part["kernel"].T for part in parts]),
        "attn.qkv.bias": np.concatenate([part["bias"] for part in parts]),
        "attn.relative_position_bias_table": attention["position_bias"],
        **_norm_to_monai("norm1", params["attention_layer_norm"]),
        **_norm_to_monai("norm2", params["mlp_layer_norm"]),
        **{f"{name}.weight": one["kernel"].T for name, one in dense.items()},
        **{f"{name}.bias": one["bias"] for name, one in dense.items()},
    }


def _norm_to_monai(name: str, params: Params) -> Weights:
    return {f"{name}.weight": params["scale"], f"{name}.bias": params["bias"]}

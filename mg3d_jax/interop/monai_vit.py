"""Weights of MONAI's `ViT` (and of UNETR's encoder) -> parameters of `models.VolumeEncoder`.

The sizes are read from the weights, except two that leave no trace in them and must be said: the number of heads and
the size of the volume. MONAI's ViT has no pooling head; ours starts fresh.
"""

from __future__ import annotations

from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from mg3d_jax.errors import UserError
from mg3d_jax.interop.state_dict import (
    StrictWeights,
    dense_params,
    norm_params,
    read_state_dict,
    split_qkv,
    stack_layers,
)

# Decoders and classification heads around the encoder, and the norms of cross-attention layers that MONAI builds but
# never calls.
UNUSED = (
    r"classification_head\.",
    r"cls_token$",
    r"blocks\.\d+\.(norm_cross_attn|cross_attn)\.",
    r"(encoder|decoder)\d+\.",
    r"out\.",
    r"proj_axes$",
)


def load_monai_vit(
    path: str | Path,
    volume_size: tuple[int, int, int],
    num_heads: int,
    patch_size: tuple[int, int, int] | None = None,
) -> tuple[dict[str, Any], dict, list[str]]:
    """Reads a MONAI ViT.

    Args:
        path: a `.pt`, `.pth`, `.bin` or `.safetensors` file.
        volume_size: voxels that the checkpoint was trained with (`img_size`).
        num_heads: attention heads.
        patch_size: needed for `proj_type="perceptron"` only; a convolution's weights tell it.

    Returns:
        Keyword arguments for `VolumeEncoder`, its parameters, and the keys of the file that were not needed.

    Raises:
        UserError: missing, unknown or misshapen keys, or sizes that contradict the weights; all of them named.
    """
    weights = read_state_dict(Path(path))
    if any(key.startswith("vit.") for key in weights):  # UNETR
        weights = {key.removeprefix("vit."): array for key, array in weights.items()}
    encoder = _sizes(path, weights, volume_size, num_heads, patch_size)
    strict = StrictWeights(weights, str(path))
    width, hidden = encoder["width"], round(encoder["width"] * encoder["mlp_ratio"])
    grid = [side // patch for side, patch in zip(volume_size, encoder["patch_size"], strict=True)]
    layers = [_layer(strict, f"blocks.{index}", width, hidden) for index in range(encoder["depth"])]
    params = {
        "patch_embedding": _patch_embedding(strict, encoder),
        "positions": strict.take("patch_embedding.position_embeddings", (1, prod(grid), width))[0],
        "stack": stack_layers(layers),
        "norm": norm_params(strict, "norm", width),
    }
    unused = strict.ignore(*UNUSED)
    strict.finish()
    if "cls_token" in unused:
        raise UserError(
            f"{path}: has a class token (classification=True), which takes part in attention; not supported."
        )
    return encoder, params, unused


def _sizes(
    path: str | Path,
    weights: dict[str, np.ndarray],
    volume_size: tuple[int, int, int],
    num_heads: int,
    patch_size: tuple[int, int, int] | None,
) -> dict[str, Any]:
    kernel = weights.get("patch_embedding.patch_embeddings.weight")
    linear = weights.get("patch_embedding.patch_embeddings.1.weight")
    if kernel is not None:
        (width, channels), patch = kernel.shape[:2], tuple(kernel.shape[2:])
        if patch_size is not None and tuple(patch_size) != patch:
            raise UserError(f"{path}: the patches are {patch}, not {tuple(patch_size)}.")
    elif linear is not None and patch_size is not None:
        width, patch, channels = linear.shape[0], tuple(patch_size), linear.shape[1] // prod(patch_size)
    elif linear is not None:
        raise UserError(f"{path}: its patch embedding is a perceptron; say the patch size with --patch-size X Y Z.")
    else:
        raise UserError(f"{path}: no patch_embedding.patch_embeddings weights; this is not a MONAI ViT.")
    depth = 1 + max((int(key.split(".")[1]) for key in weights if key.startswith("blocks.")), default=-1)
    hidden = weights["blocks.0.mlp.linear1.weight"].shape[0] if "blocks.0.mlp.linear1.weight" in weights else 4 * width
    if width % num_heads:
        raise UserError(f"{path}: its width {width} is not divisible by {num_heads} heads.")
    return {
        "width": width,
        "depth": depth,
        "num_heads": num_heads,
        "mlp_ratio": hidden / width,
        "patch_size": patch,
        "volume_size": tuple(volume_size),
        "channels": channels,
        "positions": "learned",
        "norm_epsilon": 1e-5,
        "exact_gelu": True,
    }


def _patch_embedding(strict: StrictWeights, encoder: dict[str, Any]) -> dict:
    width, patch, channels = encoder["width"], encoder["patch_size"], encoder["channels"]
    if "patch_embedding.patch_embeddings.1.weight" in strict:  # voxels row-major, channels last: our order
        return dense_params(strict, "patch_embedding.patch_embeddings.1", prod(patch) * channels, width)
    kernel = strict.take("patch_embedding.patch_embeddings.weight", (width, channels, *patch))
    bias = strict.take("patch_embedding.patch_embeddings.bias", (width,))
    return {"kernel": kernel.transpose(2, 3, 4, 1, 0).reshape(-1, width), "bias": bias}


def _layer(strict: StrictWeights, prefix: str, width: int, hidden: int) -> dict:
    has_bias = f"{prefix}.attn.qkv.bias" in strict
    return {
        "attention_layer_norm": norm_params(strict, f"{prefix}.norm1", width),
        "attention": split_qkv(strict, f"{prefix}.attn.qkv", width, has_bias)
        | {"out": dense_params(strict, f"{prefix}.attn.out_proj", width, width)},
        "mlp_layer_norm": norm_params(strict, f"{prefix}.norm2", width),
        "mlp": {
            "up": dense_params(strict, f"{prefix}.mlp.linear1", width, hidden),
            "down": dense_params(strict, f"{prefix}.mlp.linear2", hidden, width),
        },
    }

"""Weights of MONAI's `ViT` (and of UNETR's encoder) <-> parameters of `VolumeEncoder`.

The sizes are read from the weights, except two that leave no trace in them and must be said: the number of heads and
the size of the volume. MONAI's ViT has no pooling head; ours starts fresh.

In the other direction the two differ in three things. MONAI joins query, key and value into one matrix: they are
concatenated. Its norms have epsilon 1e-5, ours by default 1e-6: made up for exactly, because a norm sees its input only up
to scale, by a residual stream that is sqrt(10) times as large. Its GELU is the exact one, ours by default the tanh form:
one line that the user adds after loading (`README.md` of the export has it). It has no layer scale: ours multiplies what a
residual branch gives, which is the output of a linear layer, whose rows take the factors.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import numpy as np

from mg3d_jax.config.parts import ModelConfig
from mg3d_jax.errors import UserError
from mg3d_jax.models.towers.base import Imported, MonaiNetwork, Weights
from mg3d_jax.models.towers.segmentation_weights import UNETR_ROWS, decoder_to_monai
from mg3d_jax.models.towers.vit.torch import to_torch
from mg3d_jax.models.towers.weights import StrictWeights, dense_params, norm_params, split_qkv, stack_layers

EPSILON = 1e-5  # of MONAI's norms
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


def from_monai(
    weights: Weights,
    source: str,
    volume_size: Sequence[int],
    num_heads: int,
    patch_size: Sequence[int] | None = None,
) -> Imported:
    """A MONAI ViT.

    Args:
        volume_size: voxels that the checkpoint was trained with (`img_size`).
        num_heads: attention heads.
        patch_size: needed for `proj_type="perceptron"` only; a convolution's weights tell it.

    Raises:
        UserError: missing, unknown or misshapen keys, or sizes that contradict the weights; all of them named.
    """
    if any(key.startswith("vit.") for key in weights):  # UNETR
        weights = {key.removeprefix("vit."): array for key, array in weights.items()}
    encoder = _sizes(source, weights, volume_size, num_heads, patch_size)
    strict = StrictWeights(weights, source)
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
            f"{source}: has a class token (classification=True), which takes part in attention; not supported."
        )
    return Imported(encoder, params, unused)


def _sizes(
    source: str,
    weights: Weights,
    volume_size: Sequence[int],
    num_heads: int,
    patch_size: Sequence[int] | None,
) -> dict[str, Any]:
    kernel = weights.get("patch_embedding.patch_embeddings.weight")
    linear = weights.get("patch_embedding.patch_embeddings.1.weight")
    if kernel is not None:
        (width, channels), patch = kernel.shape[:2], tuple(kernel.shape[2:])
        if patch_size is not None and tuple(patch_size) != patch:
            raise UserError(f"{source}: the patches are {patch}, not {tuple(patch_size)}.")
    elif linear is not None and patch_size is not None:
        width, patch, channels = linear.shape[0], tuple(patch_size), linear.shape[1] // prod(patch_size)
    elif linear is not None:
        raise UserError(f"{source}: its patch embedding is a perceptron; say the patch size with --patch-size X Y Z.")
    else:
        raise UserError(f"{source}: no patch_embedding.patch_embeddings weights; this is not a MONAI ViT.")
    depth = 1 + max((int(key.split(".")[1]) for key in weights if key.startswith("blocks.")), default=-1)
    hidden = weights["blocks.0.mlp.linear1.weight"].shape[0] if "blocks.0.mlp.linear1.weight" in weights else 4 * width
    if width % num_heads:
        raise UserError(f"{source}: its width {width} is not divisible by {num_heads} heads.")
    return {
        "width": width,
        "depth": depth,
        "num_heads": num_heads,
        "mlp_ratio": hidden / width,
        "patch_size": patch,
        "volume_size": tuple(volume_size),
        "channels": channels,
        "positions": "learned",
        "norm_epsilon": EPSILON,
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


def stream_scale(model: ModelConfig) -> float:
    """What the residual stream is multiplied with, so that norms with MONAI's epsilon give what ours give."""
    return float(np.sqrt(EPSILON / model.volume_encoder.options.norm_epsilon))


def exact_gelu(model: ModelConfig) -> bool:
    """Was the volume encoder trained with the exact GELU, as MONAI has it?"""
    return model.volume_encoder.options.exact_gelu


def obstacles(model: ModelConfig) -> list[str]:
    """Settings of the volume encoder that MONAI's `ViT` has no place for."""
    options = model.volume_encoder.options
    checks = (
        (options.stem != "linear", f"stem = {options.stem!r}: MONAI's stem is one convolution; train with 'linear'"),
        (options.num_registers, f"num_registers = {options.num_registers}: MONAI has no register tokens; train with 0"),
        (options.qk_norm, "qk_norm = True: MONAI does not normalise queries and keys; train with False"),
    )  # fmt: skip
    return [f"model.volume_encoder.{text}" for prevents, text in checks if prevents]


def monai_arguments(model: ModelConfig, channels: int) -> dict[str, Any]:
    """Keyword arguments of `monai.networks.nets.ViT`."""
    volume = model.volume_encoder.sizes
    return {
        "in_channels": channels,
        "img_size": list(model.volume_size),
        "patch_size": list(model.volume_encoder.options.patch_size),
        "hidden_size": volume.width,
        "mlp_dim": volume.mlp_dim,
        "num_layers": volume.depth,
        "num_heads": volume.num_heads,
        "proj_type": "conv",
        "qkv_bias": True,
    }


def to_monai(params: dict[str, Any], model: ModelConfig) -> dict[str, np.ndarray]:
    """State dict of MONAI's `ViT`, float32, from the encoder's parameters.

    `UserError` naming the settings for which there is none.
    """
    if found := obstacles(model):
        raise UserError("MONAI's ViT cannot hold this volume encoder:\n  - " + "\n  - ".join(found))
    scale = stream_scale(model)
    ours = to_torch(params, model)
    state = {
        "patch_embedding.position_embeddings": ours["positions"][None] * scale,
        "patch_embedding.patch_embeddings.weight": ours["patch_embedding.weight"] * scale,
        "patch_embedding.patch_embeddings.bias": ours["patch_embedding.bias"] * scale,
        "norm.weight": ours["norm.weight"],
        "norm.bias": ours["norm.bias"],
    }
    for number in range(model.volume_encoder.sizes.depth):
        for kind in ("weight", "bias"):
            block, to = (lambda name, i=number, k=kind: ours[f"blocks.{i}.{name}.{k}"]), f"blocks.{number}."
            state[f"{to}norm1.{kind}"], state[f"{to}norm2.{kind}"] = (
                block("attention_layer_norm"),
                block("mlp_layer_norm"),
            )
            factor = lambda name, i=number: ours.get(f"blocks.{i}.{name}.weight", np.float32(1))  # noqa: E731
            parts = [block(f"attention.{name}") for name in ("query", "key", "value")]
            state[f"{to}attn.qkv.{kind}"] = np.concatenate(parts)
            state[f"{to}attn.out_proj.{kind}"] = (block("attention.out").T * factor("attention_scale")).T * scale
            state[f"{to}mlp.linear1.{kind}"] = block("mlp.up")
            state[f"{to}mlp.linear2.{kind}"] = (block("mlp.down").T * factor("mlp_scale")).T * scale
    return {name: np.ascontiguousarray(array, np.float32) for name, array in state.items()}


def to_vit(params: dict[str, Any], model: ModelConfig, channels: int) -> MonaiNetwork:
    """The volume encoder as MONAI's `ViT`. `UserError` naming the settings for which it has no place.

    Args:
        params: of the volume encoder.
    """
    return MonaiNetwork("ViT", monai_arguments(model, channels), to_monai(params, model))


UNETR_PATCH, UNETR_DEPTH = (16, 16, 16), 12  # which MONAI's has no arguments for


def to_unetr(params: dict[str, Any], model: ModelConfig, channels: int) -> MonaiNetwork:
    """A model that segments as MONAI's `UNETR`. `UserError` naming what it has no place for.

    Args:
        params: of the whole model.
    """
    encoder, head = model.volume_encoder, params["segmentation_head"]
    problems = obstacles(model)
    if tuple(encoder.options.patch_size) != UNETR_PATCH:
        problems.append(f"model.volume_encoder.patch_size = {tuple(encoder.options.patch_size)}: its patches are 16")
    if encoder.sizes.depth != UNETR_DEPTH:
        problems.append(f"model.volume_encoder.preset = {encoder.preset!r} has {encoder.sizes.depth} layers: it has 12")
    if problems:
        raise UserError("MONAI's UNETR cannot hold this model:\n  - " + "\n  - ".join(problems))
    decoder = decoder_to_monai(params["segmentation_decoder"], head, UNETR_ROWS)
    for name in (f"encoder{level}.transp_conv_init.conv.weight" for level in (2, 3, 4)):
        decoder[name] = decoder[name] / stream_scale(model)  # what reads the residual stream
    arguments = monai_arguments(model, channels)
    arguments = {name: arguments[name] for name in arguments if name not in ("patch_size", "num_layers")}
    arguments |= {"out_channels": len(head["bias"]), "feature_size": len(head["kernel"])}
    vit = {f"vit.{name}": array for name, array in to_monai(params["volume_encoder"], model).items()}
    return MonaiNetwork("UNETR", arguments, vit | decoder)

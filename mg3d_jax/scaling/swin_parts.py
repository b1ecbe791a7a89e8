"""Parameters and forward FLOPs of `models.swin.SwinEncoder`."""

from __future__ import annotations

from math import prod

from mg3d_jax.models.swin import fit_window
from mg3d_jax.models.towers.base import Grid
from mg3d_jax.models.towers.swin import SwinSizes
from mg3d_jax.scaling.layer_parts import ADD, GELU_ERF, LAYER_NORM, SOFTMAX, Part, dense, each, mlp, norm, residual

MLP_RATIO = 4
ROOT = "volume_encoder"
KERNEL = 27  # taps of a 3x3x3 convolution


def swin_tower(preset: SwinSizes, volume_size: Grid, channels: int) -> list[Part]:
    """Up to the tokens. Padded windows are computed, and counted; what the shift masks is too."""
    size = tuple(side // patch for side, patch in zip(volume_size, preset.patch_size, strict=True))
    found = [dense(f"{ROOT}/patch_embedding", prod(size), prod(preset.patch_size) * channels, preset.embed)]
    for stage, (depth, heads) in enumerate(zip(preset.depths, preset.stage_heads, strict=True)):
        width = preset.embed * 2**stage
        if preset.residual_convolutions:
            found.append(_convolutions(f"{ROOT}/convolution_{stage}", size, width))
        for number in range(depth):
            found += _block(f"{ROOT}/stage_{stage}_block_{number}", preset, size, width, heads, bool(number % 2))
        size = tuple(-(-side // 2) for side in size)
        name = f"{ROOT}/merging_{stage}"
        found.append(norm(f"{name}/norm", prod(size), 8 * width))
        found.append(dense(f"{name}/reduction", prod(size), 8 * width, 2 * width, bias=False))
    return [*found, Part("normalised", elementwise=each(LAYER_NORM, prod(size) * preset.width))]


def _block(name: str, preset: SwinSizes, size: Grid, width: int, heads: int, shifted: bool) -> list[Part]:
    """`models.swin.SwinBlock`."""
    half = tuple(extent // 2 for extent in preset.window) if shifted else (0, 0, 0)
    window, shift = fit_window(size, preset.window, half)
    tokens, length = prod(size), prod(window)
    padded = prod(-(-side // extent) * extent for side, extent in zip(size, window, strict=True))
    table = heads * prod(2 * extent - 1 for extent in preset.window)
    logits = heads * padded * length
    biases = (1 + any(shift)) * ADD[0] * logits, (1 + any(shift)) * ADD[1] * logits
    softmax = each(SOFTMAX, logits)
    return [
        norm(f"{name}/attention_layer_norm", tokens, width),
        *(dense(f"{name}/attention/{part}", padded, width, width) for part in ("query", "key", "value")),
        Part(
            f"{name}/attention/position_bias",
            table,
            mixing=4.0 * padded * length * width,
            elementwise=(softmax[0] + biases[0], softmax[1] + biases[1]),
        ),
        dense(f"{name}/attention/out", padded, width, width),
        norm(f"{name}/mlp_layer_norm", tokens, width),
        *mlp(f"{name}/mlp", tokens, width, MLP_RATIO * width, GELU_ERF),
        residual(name, 2 * tokens, width),
    ]


def _convolutions(name: str, size: Grid, width: int) -> Part:
    """`models.swin.ResidualConvolution`: two convolutions, each with instance norm."""
    elements = prod(size) * width
    both = each(LAYER_NORM, 2 * elements)
    weights = 2 * KERNEL * width * width
    return Part(f"{name}/conv_1", weights, dense=2.0 * prod(size) * weights, elementwise=both)

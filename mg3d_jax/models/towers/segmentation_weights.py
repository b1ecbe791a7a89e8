"""Weights of a segmentation decoder and its head as those of MONAI's `UNETR` or `SwinUNETR`, and back; and as those of its
counterpart in `interop/torch_template`."""

from __future__ import annotations

import re
from typing import Any

import numpy as np

from mg3d_jax.models.patches import halvings
from mg3d_jax.models.positions import Grid
from mg3d_jax.models.towers.base import Params, Weights

Row = tuple[str, str]  # name among the decoder's parameters, name among MONAI's weights


def _convolution(ours: str, theirs: str) -> list[Row]:
    names = (("conv_1", "conv1"), ("conv_2", "conv2"), ("shortcut/kernel", "conv3"))
    return [(f"{ours}/{own}", f"{theirs}.{name}.conv.weight") for own, name in names]


def _merge(ours: str, theirs: str) -> list[Row]:
    up = (f"{ours}/up/kernel", f"{theirs}.transp_conv.conv.weight")
    return [up, *_convolution(f"{ours}/convolution", f"{theirs}.conv_block")]


def _unetr_rows(levels: int) -> list[Row]:
    rows = _convolution("skip_0", "encoder1.layer")
    for level in range(1, levels):
        ours, theirs = f"skip_{level}", f"encoder{level + 1}"
        rows.append((f"{ours}_up_0/kernel", f"{theirs}.transp_conv_init.conv.weight"))
        for number in range(1, levels - level):
            rows.append((f"{ours}_up_{number}/kernel", f"{theirs}.blocks.{number - 1}.0.conv.weight"))
            rows += _convolution(f"{ours}_convolution_{number}", f"{theirs}.blocks.{number - 1}.1")
    return rows + [row for level in range(levels) for row in _merge(f"merge_{level}", f"decoder{level + 2}")]


def _swin_rows(stages: int) -> list[Row]:
    rows = [row for stage in range(stages) for row in _convolution(f"skip_{stage}", f"encoder{stage + 1}.layer")]
    rows += _convolution("bottom", "encoder10.layer")
    return rows + [row for stage in range(stages + 1) for row in _merge(f"merge_{stage}", f"decoder{stage + 1}")]


UNETR_ROWS = _unetr_rows(4)  # patches of 16
SWIN_UNETR_ROWS = _swin_rows(4)  # four stages
OUT_WEIGHT, OUT_BIAS = "out.conv.conv.weight", "out.conv.conv.bias"


def decoder_to_monai(params: Params, head: Params, rows: list[Row]) -> Weights:
    """Parameters of the decoder and `{"kernel": [width, classes], "bias": [classes]}` of the head -> MONAI's weights.

    Args:
        rows: `UNETR_ROWS` or `SWIN_UNETR_ROWS`; `KeyError` for a decoder of other levels.
    """
    flat = _flat(params)
    found = {theirs: _to_torch(ours, flat.pop(ours)) for ours, theirs in rows if ours in flat}
    if flat:
        raise KeyError(f"MONAI's decoder has no place for {sorted(flat)}")
    return found | {OUT_WEIGHT: np.asarray(head["kernel"]).T[..., None, None, None], OUT_BIAS: np.asarray(head["bias"])}


def decoder_from_monai(weights: Weights, rows: list[Row]) -> tuple[Params, Params]:
    """The inverse: parameters of decoder and head. What belongs to neither is not looked at."""
    params: dict[str, Any] = {}
    for ours, theirs in rows:
        if theirs in weights:
            *path, name = ours.split("/")
            place = params
            for part in path:
                place = place.setdefault(part, {})
            place[name] = _from_torch(ours, weights[theirs])
    return params, {"kernel": weights[OUT_WEIGHT][..., 0, 0, 0].T, "bias": weights[OUT_BIAS]}


def decoder_to_torch(params: Params, patch: Grid) -> Weights:
    """Parameters of a `UnetrDecoder` for patches of this size -> weights of the one in `interop/torch_template`."""
    strides = halvings(patch)

    def stride(name: str) -> Grid:
        if found := re.match(r"merge_(\d+)/up/", name):
            return strides[int(found[1])]
        if found := re.match(r"skip_(\d+)_up_([1-9]\d*)/", name):
            return strides[-1 - int(found[2])]
        return strides[-1]

    flat = _flat(params)
    return {
        f"{name.removesuffix('/kernel').replace('/', '.')}.weight": _to_torch(name, array, stride(name))
        for name, array in flat.items()
    }


def _to_torch(name: str, array: np.ndarray, stride: Grid = (2, 2, 2)) -> np.ndarray:
    array = np.asarray(array)
    if name.endswith("up/kernel") or "_up_" in name:  # [in, 8 out], voxels before channels -> [in, out, 2, 2, 2]
        return array.reshape(len(array), *stride, -1).transpose(0, 4, 1, 2, 3)
    if name.endswith("shortcut/kernel"):
        return array.T[..., None, None, None]
    return array.transpose(4, 3, 0, 1, 2)


def _from_torch(name: str, array: np.ndarray) -> np.ndarray:
    if name.endswith("up/kernel") or "_up_" in name:
        return array.transpose(0, 2, 3, 4, 1).reshape(len(array), -1)
    if name.endswith("shortcut/kernel"):
        return array[..., 0, 0, 0].T
    return array.transpose(2, 3, 4, 1, 0)


def _flat(params: Params, prefix: str = "") -> dict[str, np.ndarray]:
    found: dict[str, np.ndarray] = {}
    for name, value in params.items():
        found |= _flat(value, f"{prefix}{name}/") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return found

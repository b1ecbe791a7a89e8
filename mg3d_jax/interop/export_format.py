"""Our parameters under PyTorch's names and layouts, and the `config.json` of the exported model.

| here | PyTorch |
|---|---|
| `kernel [in, out]` | `weight [out, in]` |
| `kernel [px * py * pz * C, out]` of a patch embedding | `weight [out, C, px, py, pz]` |
| `scale` of a norm or layer scale, `*_embedding` tables | `weight` |
| `stack/blocks/block/... [L, ...]` | `blocks.0. ... blocks.L-1.` |

Floor: `numpy` only; what is exported is checked against PyTorch in `export.py`.
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np

from mg3d_jax import __version__
from mg3d_jax.config import Config
from mg3d_jax.errors import UserError
from mg3d_jax.models.positions import sincos
from mg3d_jax.models.volume_encoder import stem_strides

EXPORTED = ("volume_encoder", "report_encoder", "report_pool", "volume_projection", "report_projection", "logit_scale")
_RENAMED = ((r"(volume|report)_projection\.out", r"\1_projection"), (r"\.(conv|norm)_(\d+)\.", r".\1s.\2."))
_TABLES = ("word_embedding", "position_embedding", "type_embedding")


def split_params(params: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The part of a run's parameters that PyTorch users get, and the names of the rest (heads of the pre-training)."""
    if missing := [name for name in EXPORTED if name not in params]:
        raise UserError(f"the checkpoint lacks {missing}: it is not a checkpoint of the MG3D model")
    kept = [*EXPORTED, *({"logit_bias"} & params.keys())]  # the sigmoid loss has one
    return {name: params[name] for name in kept}, sorted(params.keys() - set(kept))


def torch_state(params: dict[str, Any], config: Config) -> dict[str, np.ndarray]:
    """`MG3DModel.state_dict()` as contiguous float32 arrays. `params` are those that `split_params` returns."""
    model = config.model
    state: dict[str, np.ndarray] = {}
    for path, leaf in _flatten(params):
        if "stack" in path:
            state |= _stack(path, leaf)
        else:
            name, array = _convert(path, leaf, config)
            state[name] = array
    if model.volume_encoder.options.positions == "sincos":
        state["volume_encoder.positions"] = sincos(model.token_grid(), model.volume_encoder.sizes.width)
    return {name: np.asarray(array, np.float32, order="C") for name, array in sorted(state.items())}


def _flatten(tree: Any, path: tuple[str, ...] = ()) -> list[tuple[tuple[str, ...], np.ndarray]]:
    if isinstance(tree, dict):
        return [item for key, value in tree.items() for item in _flatten(value, (*path, key))]
    return [(path, np.asarray(tree))]


def _stack(path: tuple[str, ...], leaf: np.ndarray) -> dict[str, np.ndarray]:
    """One array per layer."""
    at = path.index("stack")
    before, rest = path[:at], path[at + 3 :]  # "stack", "blocks", "block"
    names = (".".join((*before, "blocks", str(number), *_leaf_name(rest))) for number in range(len(leaf)))
    return dict(zip(names, (_layout(rest, layer) for layer in leaf), strict=True))


def _leaf_name(path: tuple[str, ...] | list[str]) -> tuple[str, ...]:
    *before, last = path
    if last in ("kernel", "scale"):
        return (*before, "weight")
    return (*before, last, "weight") if last in _TABLES else (*before, last)


def _layout(path: tuple[str, ...] | list[str], leaf: np.ndarray) -> np.ndarray:
    return leaf.T if path[-1] == "kernel" else leaf


def _convert(path: tuple[str, ...], leaf: np.ndarray, config: Config) -> tuple[str, np.ndarray]:
    name = ".".join(_leaf_name(path))
    for pattern, replacement in _RENAMED:
        name = re.sub(pattern, replacement, name)
    patch = tuple(config.model.volume_encoder.options.patch_size)
    if path == ("volume_encoder", "patch_embedding", "kernel"):
        return name, convolution(leaf, patch)
    if path[:2] == ("volume_encoder", "patch_embedding") and path[-1] == "kernel" and path[2].startswith("conv_"):
        return name, convolution(leaf, stem_strides(patch)[int(path[2].removeprefix("conv_"))])
    return name, _layout(path, leaf)


def convolution(kernel: np.ndarray, patch: tuple[int, int, int]) -> np.ndarray:
    """`[px * py * pz * C, out]` (the order of `patchify`) -> `[out, C, px, py, pz]` of `Conv3d(stride=patch)`."""
    return kernel.reshape(*patch, -1, kernel.shape[-1]).transpose(4, 3, 0, 1, 2)


def torch_config(config: Config, params: dict[str, Any], spacing: tuple[float, float, float]) -> dict[str, Any]:
    """The arguments of `MG3DConfig`."""
    encoder, alignment = config.model.volume_encoder, config.objectives["alignment"]
    volume, report = encoder.sizes, config.model.report_encoder.sizes
    views = alignment.report_view == "sentences"
    strides = stem_strides(tuple(encoder.options.patch_size)) if encoder.options.stem == "conv" else []
    stem = params["volume_encoder"]["patch_embedding"]
    return {
        "volume_size": list(config.model.volume_size),
        "spacing": [float(mm) for mm in spacing],
        "orientation": "RAS",
        "windows": [list(window) for window in config.data.windows],
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
        "volume_width": volume.width,
        "volume_depth": volume.depth,
        "volume_heads": volume.num_heads,
        "volume_mlp_dim": volume.mlp_dim,
        "vocab_size": int(params["report_encoder"]["word_embedding"].shape[0]),
        "report_width": report.width,
        "report_depth": report.depth,
        "report_heads": report.num_heads,
        "report_mlp_dim": report.mlp_dim,
        "max_positions": config.model.report_encoder.max_positions,
        "type_vocab": report.type_vocab,
        "report_norm_eps": report.norm_epsilon,
        "max_tokens": config.data.max_tokens,
        "max_sentences": config.data.max_sentences,
        "report_sentences": 1 if views else 0,
        "report_tokens": config.text_tokens(),
        "projection_dim": config.model.projection_dim,
        "logit_bias": "logit_bias" in params,
    }


def hugging_face_config(arguments: dict[str, Any], *, step: int, config_hash: str) -> dict[str, Any]:
    """`config.json`: the arguments, what transformers needs to find the code, and where the weights come from."""
    return {
        "model_type": "mg3d",
        "architectures": ["MG3DModel"],
        "auto_map": {"AutoConfig": "modeling_mg3d.MG3DConfig", "AutoModel": "modeling_mg3d.MG3DModel"},
        "torch_dtype": "float32",
        **arguments,
        "mg3d_jax": {"version": __version__, "step": step, "config_hash": config_hash},
    }


def preprocessor_config(config: Config, spacing: tuple[float, float, float]) -> dict[str, Any]:
    """`preprocessor_config.json`: what the weights expect of a volume, so that nobody has to guess."""
    return {
        "input": "Hounsfield units, int16 or float, array [X, Y, Z]; rescale slope and intercept applied exactly once",
        "orientation": "RAS",
        "axes": "x to the patient's right, y anterior, z superior",
        "spacing_mm": [float(mm) for mm in spacing],
        "size_voxels": list(config.model.volume_size),
        "placement": "the centre of the volume on the centre of the grid; cropped or padded on all sides alike",
        "resampling": "area average along an axis that shrinks, linear along one that grows",
        "pad_value_hu": -1024,
        "clip_hu": [-1024, 3071],
        "windows_hu": [list(window) for window in config.data.windows],
        "window_output": [0.0, 1.0],
        "windowing": "done by encode_volume; one channel per window",
    }

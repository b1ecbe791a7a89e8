"""PyTorch and safetensors checkpoints as NumPy dictionaries, read strictly: no key is ignored silently.

`StrictWeights` hands out arrays by key and shape, collects every disagreement, and reports all of them in one error.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from safetensors import safe_open

from mg3d_jax.errors import UserError
from mg3d_jax.files import read_json

TORCH_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".tar")
CONTAINERS = ("state_dict", "model_state_dict", "model", "network_weights")
MAX_LISTED = 12


def read_state_dict(path: Path) -> dict[str, np.ndarray]:
    """Every tensor of a `.safetensors`, `.safetensors.index.json` or PyTorch file, floats as float32.

    A training checkpoint that holds its weights under "state_dict", "model" or the like is unwrapped, and a
    "module." prefix (DataParallel) is removed. PyTorch files are read with `weights_only=True`: no code in them runs.

    Raises:
        UserError: the file is missing, is not such a file, or needs PyTorch and PyTorch is not installed.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file.")
    if path.name.endswith(".index.json"):
        weight_map = read_json(path, remedy="download it again").get("weight_map")
        if not isinstance(weight_map, dict):
            raise UserError(f"{path}: has no weight_map, which says in which file each weight lies; download it again")
        shards = sorted(set(weight_map.values()))
        return {key: array for shard in shards for key, array in read_state_dict(path.parent / shard).items()}
    try:
        raw = _read_safetensors(path) if path.suffix == ".safetensors" else _read_torch(path)
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{path}: cannot be read as a checkpoint ({type(error).__name__}: {error}).") from error
    if raw and all(key.startswith("module.") for key in raw):
        raw = {key.removeprefix("module."): array for key, array in raw.items()}
    return raw


def _read_safetensors(path: Path) -> dict[str, np.ndarray]:
    with safe_open(
        path, framework="flax"
    ) as file:  # the only framework of safetensors that reads bfloat16 without torch
        return {key: _as_numpy(np.asarray(file.get_tensor(key))) for key in file.keys()}  # noqa: SIM118


def _read_torch(path: Path) -> dict[str, np.ndarray]:
    if path.suffix not in TORCH_SUFFIXES:
        raise UserError(f"{path}: expected a .safetensors file or a PyTorch one ({', '.join(TORCH_SUFFIXES)}).")
    try:
        import torch
    except ImportError as error:
        raise UserError(
            f"{path}: PyTorch is needed to read it. pip install torch, or convert it to .safetensors."
        ) from error
    loaded = torch.load(path, map_location="cpu", weights_only=True)
    for container in CONTAINERS:
        if isinstance(loaded, dict) and isinstance(loaded.get(container), dict):
            loaded = loaded[container]
            break
    if not isinstance(loaded, dict):
        raise UserError(f"{path}: holds a {type(loaded).__name__}, not a state dict.")
    tensors = {key: value for key, value in loaded.items() if isinstance(value, torch.Tensor)}
    if not tensors:
        names = sorted(map(str, loaded))
        more = f" and {len(names) - MAX_LISTED} more" if len(names) > MAX_LISTED else ""
        raise UserError(f"{path}: no tensors found; its top level has {', '.join(names[:MAX_LISTED])}{more}.")
    return {
        key: _as_numpy(value.float().numpy() if value.is_floating_point() else value.numpy())
        for key, value in tensors.items()
    }


def _as_numpy(array: np.ndarray) -> np.ndarray:
    return array if array.dtype.kind in "iub" else array.astype(np.float32)


class StrictWeights:
    """A state dict to be used up: `take` what the model needs, `ignore` what it has no place for, then `finish`."""

    def __init__(self, weights: dict[str, np.ndarray], source: str) -> None:
        self.source = source
        self._left = dict(weights)
        self._missing: list[str] = []
        self._wrong: list[str] = []

    def __contains__(self, key: str) -> bool:
        return key in self._left

    def take(self, key: str, shape: Iterable[int]) -> np.ndarray:
        """The array `key`; zeros (and an error in `finish`) when it is absent or of another shape."""
        shape = tuple(shape)
        array = self._left.pop(key, None)
        if array is None:
            self._missing.append(f"{key} {list(shape)}")
        elif array.shape != shape:
            self._wrong.append(f"{key}: {list(array.shape)} in the file, {list(shape)} in the model")
        else:
            return array
        return np.zeros(shape, np.float32)

    def ignore(self, *patterns: str) -> list[str]:
        """Drops the keys that a pattern matches from the start (heads, buffers) and returns them, for the report."""
        dropped = [key for key in self._left if any(re.match(pattern, key) for pattern in patterns)]
        for key in dropped:
            del self._left[key]
        return dropped

    def finish(self) -> None:
        """`UserError` listing every missing key, wrong shape and unknown key."""
        problems = [
            *_listing("missing in the file", self._missing),
            *_listing("of another shape", self._wrong),
            *_listing("in the file but unknown to the model", sorted(self._left)),
        ]
        if problems:
            raise UserError(f"{self.source} does not fit the model:\n  " + "\n  ".join(problems))


def _listing(what: str, names: list[str]) -> list[str]:
    if not names:
        return []
    more = [f"    ... and {len(names) - MAX_LISTED} more"] if len(names) > MAX_LISTED else []
    return [f"{len(names)} {what}:", *(f"    {name}" for name in names[:MAX_LISTED]), *more]


def dense_params(weights: StrictWeights, prefix: str, inputs: int, outputs: int, bias: bool = True) -> dict:
    """A PyTorch Linear as Linen `{"kernel": [in, out], "bias": [out]}`."""
    params = {"kernel": weights.take(f"{prefix}.weight", (outputs, inputs)).T}
    return params | ({"bias": weights.take(f"{prefix}.bias", (outputs,))} if bias else {})


def norm_params(weights: StrictWeights, prefix: str, width: int) -> dict:
    """A PyTorch LayerNorm as Linen `{"scale", "bias"}`; also under TensorFlow's old names gamma and beta."""
    if f"{prefix}.gamma" in weights:
        return {"scale": weights.take(f"{prefix}.gamma", (width,)), "bias": weights.take(f"{prefix}.beta", (width,))}
    return {"scale": weights.take(f"{prefix}.weight", (width,)), "bias": weights.take(f"{prefix}.bias", (width,))}


def split_qkv(weights: StrictWeights, prefix: str, width: int, bias: bool) -> dict:
    """A fused PyTorch `qkv` Linear [3d, d] as our "query", "key", "value"; no bias becomes a bias of zeros."""
    kernels = np.split(weights.take(f"{prefix}.weight", (3 * width, width)), 3)
    biases = np.split(weights.take(f"{prefix}.bias", (3 * width,)) if bias else np.zeros(3 * width, np.float32), 3)
    return {
        name: {"kernel": kernel.T, "bias": offset}
        for name, kernel, offset in zip(("query", "key", "value"), kernels, biases, strict=True)
    }


def stack_layers(layers: list[dict]) -> dict:
    """Per-layer parameter dicts -> the layout of `transformer.Stack`: leaves with a leading "layers" axis."""
    import jax

    return {"blocks": {"block": jax.tree.map(lambda *leaves: np.stack(leaves), *layers)}}

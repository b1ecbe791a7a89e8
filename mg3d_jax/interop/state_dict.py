"""PyTorch and safetensors checkpoints as NumPy dictionaries."""

from __future__ import annotations

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

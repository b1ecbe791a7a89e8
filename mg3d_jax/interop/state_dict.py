"""PyTorch and safetensors checkpoints as NumPy dictionaries."""

from __future__ import annotations

import pickle
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from safetensors import safe_open

from mg3d_jax.errors import UserError
from mg3d_jax.files import read_json

TORCH_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".tar")
CONTAINERS = ("state_dict", "model_state_dict", "model", "network_weights")
# Of DataParallel, torch.compile, Lightning and the classes that people wrap an encoder in.
WRAPPERS = ("module.", "_orig_mod.", "model.", "net.", "network.", "encoder_q.")
MAX_LISTED = 12


def read_state_dict(path: Path, prefix: str = "") -> dict[str, np.ndarray]:
    """Every tensor of a `.safetensors`, `.safetensors.index.json` or PyTorch file, floats as float32.

    A training checkpoint that holds its weights under "state_dict", "model" or the like is unwrapped, and prefixes that
    wrappers put before every key (`WRAPPERS`) are removed. PyTorch files are read with `weights_only=True`: no code in them
    runs.

    Args:
        prefix: only the keys that begin with it, without it: "student.backbone.".

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
    return _chosen(raw, prefix, path) if prefix else unwrapped(raw)


def unwrapped(raw: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Without the prefixes of wrappers that stand before every key."""
    while found := [wrapper for wrapper in WRAPPERS if raw and all(key.startswith(wrapper) for key in raw)]:
        raw = {key.removeprefix(found[0]): array for key, array in raw.items()}
    return raw


def _chosen(raw: dict[str, np.ndarray], prefix: str, path: Path) -> dict[str, np.ndarray]:
    kept = {key.removeprefix(prefix): array for key, array in raw.items() if key.startswith(prefix)}
    if not kept:
        raise UserError(f"{path}: no key begins with {prefix!r}; its keys begin with {', '.join(beginnings(raw))}")
    return kept


def beginnings(keys: Iterable[str]) -> list[str]:
    """What the keys of a state dict begin with: "student.backbone. (12)", the most frequent first."""
    counts = Counter(".".join(key.split(".")[:2][: max(len(key.split(".")) - 1, 1)]) + "." for key in keys)
    return [f"{name} ({count})" for name, count in counts.most_common(MAX_LISTED)]


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
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{path}: holds Python objects beside its tensors, which are never run here. Where it was made, save the weights "
            "alone: torch.save(model.state_dict(), FILE)"
        ) from error
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

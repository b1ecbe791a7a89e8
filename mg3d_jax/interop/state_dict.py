"""PyTorch and safetensors checkpoints as NumPy dictionaries."""

from __future__ import annotations

import pickle
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open

from mg3d_jax.errors import UserError
from mg3d_jax.files import read_json

TORCH_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".tar")
# Dictionaries that training checkpoints hold weights under.
CONTAINERS = ("state_dict.", "model_state_dict.", "model.", "network_weights.")
# Of DataParallel, torch.compile, Lightning and the classes that people wrap an encoder in.
WRAPPERS = ("module.", "_orig_mod.", "net.", "network.", "encoder_q.", *CONTAINERS)
# What wrappers of single layers put into names (torch.compile, FSDP, activation checkpointing).
INSIDE = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")
NO_WEIGHTS = ("optim", "lr_sched", "sched", "scaler", "grad_scaler")  # how other parts of training checkpoints begin
ADAPTERS = re.compile(r"\.(lora_\w+|base_layer|modules_to_save)(\.|$)")  # of PEFT
MAX_LISTED = 12
Weights = dict[str, np.ndarray]


def read_state_dict(path: Path, prefix: str | None = None) -> Weights:
    """`read_weights` of a file of which it is not known what model it holds."""
    return read_weights(path, prefix=prefix)[0]


def read_weights(path: Path, root: str = "", prefix: str | None = None) -> tuple[Weights, list[str]]:
    """The tensors of one model in a `.safetensors`, `.safetensors.index.json` or PyTorch file, floats as float32, and the
    names of what else is in the file.

    Training checkpoints hold models under names like "state_dict", "teacher" or "model_ema", and wrappers put prefixes before
    the names of tensors: where exactly one place in the file has the tensor `root`, that place is the model's. PyTorch files
    are read with `weights_only=True`: no code in them runs.

    Args:
        root: a tensor that every model of its kind has; "": not known, prefixes that stand before every key are removed.
        prefix: only the keys that begin with it, without it: "student.backbone.". None: all.

    Raises:
        UserError: the file is missing, is not such a file, needs PyTorch, which is not installed, or holds adapters; or none or
            several places have `root`: their prefixes are listed.
    """
    raw = _read(path)
    kept = unwrapped(raw) if prefix is None and not root else raw
    if prefix:
        kept = _chosen(raw, prefix, path)
    if not root:
        return kept, []
    places = [key.removesuffix(root) for key in kept if f".{key}".endswith(f".{root}")]
    if prefix == "" and "" in places:
        places = [""]
    if len(places) != 1:
        raise UserError(f"{path}: {_places(places, root, kept, prefix or '')}")
    if adapted := [key for key in kept if key.startswith(places[0]) and ADAPTERS.search(key)]:
        raise UserError(
            f"{path}: holds adapters beside the layers ({adapted[0]}, ...): save the model with them merged, "
            "model.merge_and_unload().save_pretrained(FOLDER)"
        )
    place = f"{prefix or ''}{places[0]}"
    found = {key.removeprefix(place): array for key, array in raw.items() if key.startswith(place)}
    return found, sorted(key for key in raw if not key.startswith(place))


def _places(places: list[str], root: str, keys: Iterable[str], before: str) -> str:
    """What to do where not exactly one place has `root`."""
    if not places:
        return f"no key ends with {root}, which such a model has; its keys begin with {', '.join(beginnings(keys))}"
    lines = [f"\n  --prefix {before + place or repr('')}" for place in places[:MAX_LISTED]]
    return f"{len(places)} models are in it; say which by adding one of these to the command:{''.join(lines)}"


def unwrapped(raw: Weights) -> Weights:
    """Without the prefixes of wrappers that stand before every key."""
    while found := [wrapper for wrapper in WRAPPERS if raw and all(key.startswith(wrapper) for key in raw)]:
        raw = {key.removeprefix(found[0]): array for key, array in raw.items()}
    return raw


def _read(path: Path) -> Weights:
    """Every tensor under its whole name, without what wrappers put inside of names."""
    if not path.is_file():
        raise UserError(f"{path}: no such file.")
    if path.name.endswith(".index.json"):
        weight_map = read_json(path, remedy="download it again").get("weight_map")
        if not isinstance(weight_map, dict):
            raise UserError(f"{path}: has no weight_map, which says in which file each weight lies; download it again")
        shards = sorted(set(weight_map.values()))
        return {key: array for shard in shards for key, array in _read(path.parent / shard).items()}
    try:
        raw = _read_safetensors(path) if path.suffix == ".safetensors" else _read_torch(path)
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{path}: cannot be read as a checkpoint ({type(error).__name__}: {error}).") from error
    for wrapper in INSIDE:
        raw = {key.replace(wrapper, ""): array for key, array in raw.items()}
    return raw


def _chosen(raw: Weights, prefix: str, path: Path) -> Weights:
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
    if not isinstance(loaded, dict):
        raise UserError(f"{path}: holds a {type(loaded).__name__}, not a state dict.")
    tensors = _tensors(loaded, torch.Tensor)
    if not tensors:
        names = sorted(map(str, loaded))
        more = f" and {len(names) - MAX_LISTED} more" if len(names) > MAX_LISTED else ""
        raise UserError(f"{path}: no tensors found; its top level has {', '.join(names[:MAX_LISTED])}{more}.")
    return {
        key: _as_numpy(value.float().numpy() if value.is_floating_point() else value.numpy())
        for key, value in tensors.items()
    }


def _tensors(tree: Mapping[Any, Any], kind: type) -> dict[str, Any]:
    """Of nested dictionaries, under dotted names; without the state of optimizers."""
    found: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, kind):
            found[str(name)] = value
        elif isinstance(value, Mapping) and not str(name).startswith(NO_WEIGHTS):
            found |= {f"{name}.{key}": tensor for key, tensor in _tensors(value, kind).items()}
    return found


def _as_numpy(array: np.ndarray) -> np.ndarray:
    return array if array.dtype.kind in "iub" else array.astype(np.float32)

"""The weights of an exported model as files: safetensors of either precision, several above a size."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from mg3d_jax import config as config_lib
from mg3d_jax.files import write_json
from mg3d_jax.interop.export_options import shard_bytes
from mg3d_jax.interop.export_run import Run

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


def rounded(tree: Any, dtype: str) -> Any:
    """float32 arrays with the values that `dtype` can store."""
    if dtype == "float32":
        return tree
    import jax
    import jax.numpy as jnp

    return jax.tree.map(lambda x: np.asarray(np.asarray(x, jnp.bfloat16), np.float32), tree)


def as_stored(run: Run, state: Mapping[str, np.ndarray], dtype: str) -> Run:
    """A run that computes with what a file of `state` in `dtype` holds: its fixed positions, too, which are stored with the
    weights and rounded like them."""
    key = "volume_encoder.positions"
    fixed = key in state and "positions" not in run.params["volume_encoder"]
    if dtype == "float32" or not fixed:
        return run
    config = config_lib.replace(run.config, {"model.volume_encoder.positions": "learned"})
    encoder = run.params["volume_encoder"] | {"positions": rounded(state[key], dtype)}
    return replace(run, config=config, params=run.params | {"volume_encoder": encoder})


def save(state: Mapping[str, np.ndarray], folder: Path, *, dtype: str, shard_size: str, settings: str) -> None:
    """Writes `model.safetensors`, or its parts with their index.

    Args:
        settings: JSON that every file carries in its metadata, by which a wrong `config.json` is noticed at load.
    """
    import torch
    from huggingface_hub import split_torch_state_dict_into_shards
    from safetensors.torch import save_file

    from mg3d_jax.interop.torch_template.towers_mg3d import SETTINGS

    kind = torch.bfloat16 if dtype == "bf16" else torch.float32
    tensors = {name: torch.from_numpy(np.array(array, order="C")).to(kind) for name, array in state.items()}
    parts = split_torch_state_dict_into_shards(tensors, max_shard_size=shard_bytes(shard_size))
    for file, names in parts.filename_to_tensors.items():
        save_file({name: tensors[name] for name in names}, folder / file, metadata={"format": "pt", SETTINGS: settings})
    if parts.is_sharded:
        weight_map = dict(sorted(parts.tensor_to_filename.items()))
        write_json(folder / INDEX, {"metadata": json.loads(json.dumps(parts.metadata)), "weight_map": weight_map})

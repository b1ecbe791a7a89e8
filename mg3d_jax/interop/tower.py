"""One imported tower as a folder: `tower.json` (kind, sizes, source) and `tower.safetensors` (parameters by path).

`mg3d import` writes such folders; a run starts from one by `model.volume_encoder.pretrained` or
`model.report_encoder.pretrained`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import flax.linen as nn
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors.numpy import load_file, save_file

from mg3d_jax.errors import UserError
from mg3d_jax.files import write_json
from mg3d_jax.models.positions import Grid
from mg3d_jax.models.towers import base
from mg3d_jax.registry import REPORT_TOWERS, VOLUME_TOWERS

MAX_LISTED = 12


@dataclass(frozen=True)
class Tower:
    """An encoder's kind as it is registered, the fields of its module, its parameters, and their source."""

    kind: str
    encoder: dict[str, Any]
    params: dict
    source: str
    unused: list[str] = field(default_factory=list)

    def module(self, **options: Any) -> nn.Module:
        """The Linen module that these parameters fit; `options` are further fields (dtype, remat, pooling, ...)."""
        return self.declared.module(**self.encoder | options)

    @property
    def declared(self) -> base.Tower:
        """What its kind declares. `UserError` where no such tower is registered."""
        return (REPORT_TOWERS if self.kind in REPORT_TOWERS else VOLUME_TOWERS)[self.kind]

    @property
    def parameter_count(self) -> int:
        return sum(array.size for array in flatten_dict(self.params).values())


def save_tower(tower: Tower, folder: Path) -> None:
    """Writes the folder; `UserError` when it holds something else already."""
    if folder.exists() and any(folder.iterdir()) and not (folder / "tower.json").is_file():
        raise UserError(f"{folder} exists and is no imported tower; choose another --out.")
    folder.mkdir(parents=True, exist_ok=True)
    arrays = {name: np.ascontiguousarray(array) for name, array in flatten_dict(tower.params, sep="/").items()}
    save_file(arrays, folder / "tower.safetensors")
    content = {"kind": tower.kind, "encoder": tower.encoder, "source": tower.source, "unused": tower.unused}
    write_json(folder / "tower.json", content)


def load_tower(folder: Path) -> Tower:
    """Reads the folder that `save_tower` wrote; `UserError` when it is not one."""
    try:
        content = json.loads((folder / "tower.json").read_text())
        params = unflatten_dict(load_file(folder / "tower.safetensors"), sep="/")
    except (OSError, ValueError) as error:
        raise UserError(f"{folder}: is no folder written by `mg3d import` ({error}).") from error
    encoder = {key: tuple(value) if isinstance(value, list) else value for key, value in content["encoder"].items()}
    return Tower(content["kind"], encoder, params, content["source"], content["unused"])


def at_volume_size(tower: Tower, volume_size: Grid) -> Tower:
    """The same tower for volumes of another size, where that makes a difference to its parameters."""
    encoder, params = tower.declared.at_volume_size(tower.encoder, tower.params, volume_size)
    return replace(tower, params=params, encoder=encoder)


def check_fields(tower: Tower, module: nn.Module) -> None:
    """`UserError` unless the module computes what the tower did: sizes, and what leaves no trace in the parameters (number
    of heads, epsilon, form of GELU, order of merging). All differences are named, with both values."""
    pairs = {name: (value, getattr(module, name)) for name, value in tower.encoder.items()}
    wrong = [f"{name}: {a!r} in the checkpoint, {b!r} in the model" for name, (a, b) in pairs.items() if a != b]
    if wrong:
        raise UserError(
            f"{tower.source} does not fit the {tower.kind} encoder of the config; set preset and keys to the checkpoint's:"
            "\n  " + "\n  ".join(wrong)
        )

"""How every parameter and moment lies on three meshes, by preset of the volume encoder: the files beside this one.

A change of a rule, an axis name or a model shows there as a difference to read. After a change that is meant:

    python tests/golden/shardings.py
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

if __name__ == "__main__":  # pytest's conftest.py does the same
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from unittest import mock

from mg3d_jax import config as config_lib
from mg3d_jax import sharding
from mg3d_jax.training import state as state_lib
from mg3d_jax.training import tables

FOLDER = Path(__file__).parent
PRESETS = ("ti", "b", "l")
MESHES = ((8, 1, 1), (2, 4, 1), (2, 2, 2))  # data, fsdp, tensor
VOCABULARY = 4096


def whole_method(preset: str) -> config_lib.Config:
    """The default configuration with that volume encoder and every objective of the paper."""
    config = config_lib.default().unlock()
    config.model.volume_encoder.preset = preset
    config_lib.use_objectives(config, "mg3d")
    return config_lib.typed(config)


def setups(preset: str) -> Iterator[state_lib.Setup]:
    """The state on each of the meshes, abstract; the model is traced once."""
    config = whole_method(preset)
    boxed = state_lib.abstract_parameters(state_lib.random_parameters(state_lib.build_model(config, VOCABULARY)))
    with mock.patch.object(state_lib, "abstract_parameters", return_value=boxed):
        for sizes in MESHES:
            mesh = sharding.make_mesh(sharding.MeshConfig(*("", *sizes)))
            yield state_lib.build(config, VOCABULARY, mesh, steps=10)


def text(states: list[dict]) -> str:
    """One line per parameter and for those of its moments that lie as it does: name, kinds, shape, spec on every mesh."""
    columns: dict[tuple[str, str, str], list[str]] = {}
    for state in states:
        for row in tables.array_rows(state):
            key = (row.name, ",".join(row.kinds), "x".join(map(str, row.shape)))
            columns.setdefault(key, []).append(row.spec)
    heading = ("parameter", "kinds", "shape", *("x".join(map(str, sizes)) for sizes in MESHES))
    return "".join("\t".join(line) + "\n" for line in [heading, *((*k, *v) for k, v in sorted(columns.items()))])


def path(preset: str) -> Path:
    return FOLDER / f"shardings_{preset}.tsv"


if __name__ == "__main__":
    for name in PRESETS:
        path(name).write_text(text([setup.abstract for setup in setups(name)]))
        print(path(name))

"""The table of the largest arrays that a run prints before its first step."""

import io

import jax
import numpy as np
from rich.console import Console
from support import tiny_config

from mg3d_jax import sharding
from mg3d_jax.training import state as state_lib
from mg3d_jax.training import tables


def test_bytes_are_those_of_the_arrays():
    """Against the buffers of a state that is really there: in all, and on the first device."""
    mesh = sharding.make_mesh(sharding.MeshConfig(data=2, fsdp=2, tensor=2))
    setup = state_lib.build(tiny_config(), 401, mesh, steps=3)
    rows = tables.array_rows(setup.abstract)
    state = jax.tree.map(lambda x: jax.device_put(np.zeros(x.shape, x.dtype), x.sharding), setup.abstract)
    arrays = [array for array in jax.tree.leaves(state) if array.ndim]
    assert sum(row.size for row in rows) == sum(array.nbytes for array in arrays)
    first = sum(s.data.nbytes for a in arrays for s in a.addressable_shards if s.device == mesh.devices[0, 0, 0])
    assert sum(row.device_size for row in rows) == first
    (largest, *_), by_name = rows, {row.name: row for row in rows}
    assert largest.size == max(row.size for row in rows)
    words = by_name["report_encoder/word_embedding"]
    assert (words.shape, words.spec) == ((401, 128), "(-, fsdp)")  # 401 rows: "tensor" does not divide them
    assert set(words.kinds) == {"params", "mu", "nu"}
    assert words.size == 3 * 401 * 128 * 4 == 2 * words.device_size
    page = io.StringIO()
    Console(file=page, width=150).print(tables.array_table(setup.abstract, mesh))
    shown = page.getvalue()
    assert shown.count("\n") < 40 and largest.name in shown and "are whole on every device" in shown


def test_mesh_is_said_with_its_preset():
    mesh = sharding.make_mesh(sharding.MeshConfig(data=-1, fsdp=4, tensor=1))
    assert tables.mesh_text(sharding.MeshConfig(), mesh) == "data 2, fsdp 4, tensor 1"
    shown = tables.mesh_text(sharding.MeshConfig(preset="gpu-node-4", slices=2), mesh)
    assert shown == "data 2, fsdp 4, tensor 1 in 2 slices (preset gpu-node-4)"

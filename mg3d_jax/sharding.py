"""The mesh and the one table that says how every array lies on it.

Modules name the axes of their parameters and activations logically ("embed", "mlp", "batch", ...). `RULES` maps those
names to mesh axes: `data` replicates parameters and splits the batch, `fsdp` splits both, `tensor` splits heads, hidden
units and vocabulary. Everything that enters or leaves a compiled function gets an explicit `NamedSharding`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from mg3d_jax.errors import UserError

MESH_AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")

# Earlier rules win a mesh axis: in an activation ("batch", "length", "embed") the batch takes `fsdp`, and "embed" stays whole.
RULES: tuple[tuple[str, str | tuple[str, ...] | None], ...] = (
    ("batch", BATCH_AXES),
    ("vocab", "tensor"),
    ("mlp", "tensor"),
    ("heads", "tensor"),
    ("embed", "fsdp"),
    ("head_dim", None),
    ("length", None),
    ("layers", None),
    ("patch", None),
    ("position", None),
    ("projection", None),
    ("register", None),
)


def make_mesh(config: ConfigDict, devices: list | None = None) -> Mesh:
    """Mesh with axes `data`, `fsdp`, `tensor` over all devices; one size may be -1 (what is left).

    Devices are ordered by process, so that each process holds a contiguous range of the batch.
    """
    devices = sorted(jax.devices() if devices is None else devices, key=lambda d: (d.process_index, d.id))
    sizes = [config.data, config.fsdp, config.tensor]
    known = math.prod(s for s in sizes if s != -1)
    if len(devices) % known or (-1 not in sizes and known != len(devices)):
        raise UserError(
            f"mesh (data, fsdp, tensor) = {tuple(sizes)} does not fit {len(devices)} device(s): their product must be "
            f"{len(devices)}; set one size to -1, e.g. --config.mesh.data=-1"
        )
    shape = [len(devices) // known if s == -1 else s for s in sizes]
    return Mesh(np.array(devices).reshape(shape), MESH_AXES, axis_types=(AxisType.Auto,) * 3)


@contextmanager
def in_mesh(mesh: Mesh) -> Iterator[None]:
    """Inside, the mesh and the axis rules hold; without both, the modules' sharding constraints are silent no-ops."""
    with jax.set_mesh(mesh), nn.logical_axis_rules(RULES):
        yield


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Axis 0 over `data` and `fsdp`, the rest whole."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def batch_shards(mesh: Mesh) -> int:
    """How many parts the batch is split into."""
    return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def local_rows(mesh: Mesh, batch_size: int) -> range:
    """The rows of the global batch that this process must supply (the rows on its own devices)."""
    index_map = batch_sharding(mesh).addressable_devices_indices_map((batch_size,))
    starts, stops = zip(*(s[0].indices(batch_size)[:2] for s in index_map.values()), strict=True)
    return range(min(starts), max(stops))


def to_global(local: dict[str, np.ndarray], mesh: Mesh, batch_size: int) -> dict[str, jax.Array]:
    """Host rows `local_rows(mesh, batch_size)` of every field -> global arrays sharded over the batch axis."""
    sharding, first = batch_sharding(mesh), local_rows(mesh, batch_size).start

    def place(array: np.ndarray) -> jax.Array:
        def rows(index: tuple[slice, ...]) -> np.ndarray:
            start, stop, _ = index[0].indices(batch_size)
            return array[start - first : stop - first]

        return jax.make_array_from_callback((batch_size, *array.shape[1:]), sharding, rows)

    return {name: place(array) for name, array in local.items()}


def parameter_shardings(boxed: Any, mesh: Mesh) -> Any:
    """Shardings of a (possibly abstract) Linen parameter tree whose leaves carry logical names.

    Raises `ValueError` for a name that `RULES` lacks (Linen would replicate it silently). An axis whose size the mesh
    does not divide stays whole.
    """
    specs = nn.get_partition_spec(boxed)
    check_names(name for spec in jax.tree.leaves(specs, is_leaf=_is_spec) for name in spec)
    shapes = jax.tree.map(lambda x: x.shape, nn.unbox(boxed), is_leaf=lambda x: hasattr(x, "shape"))

    def place(spec: PartitionSpec, shape: tuple[int, ...]) -> NamedSharding:
        axes = nn.logical_to_mesh_axes(spec, RULES)
        whole = (
            axis if axis is None or size % math.prod(mesh.shape[a] for a in np.atleast_1d(axis)) == 0 else None
            for axis, size in zip(axes, shape, strict=False)
        )
        return NamedSharding(mesh, PartitionSpec(*whole))

    return jax.tree.map(place, specs, shapes, is_leaf=_is_spec)


def check_names(names: Iterable[str | tuple | None]) -> None:
    """Raises `ValueError` for a logical axis name that no rule covers."""
    known = {name for name, _ in RULES}
    unknown = {n for n in names if n is not None and n not in known}
    if unknown:
        raise ValueError(f"logical axes {sorted(map(str, unknown))} are not in sharding.RULES; known: {sorted(known)}")


def _is_spec(x: Any) -> bool:
    return isinstance(x, PartitionSpec)

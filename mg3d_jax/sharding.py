"""The mesh and the one table that says how every array lies on it.

The axes go from slow to fast links: `data`, outermost, is the only one that may cross from one slice (or group of hosts)
to another; `fsdp` and `tensor` stay within one.

Modules name the axes of their parameters and activations logically ("embed", "mlp", "batch", ...). `RULES` maps those
names to mesh axes: `data` replicates parameters and splits the batch, `fsdp` splits both, `tensor` splits heads, hidden
units and vocabulary. Everything that enters or leaves a compiled function gets an explicit `NamedSharding`.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from mg3d_jax.errors import UserError
from mg3d_jax.options import key

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


@dataclass(frozen=True)
class MeshPreset:
    """Sizes of `fsdp` and `tensor`; `data` is what is left. `devices`: how many a slice must have, None for any number."""

    fsdp: int
    tensor: int
    devices: int | None
    why: str


# By hardware. TPUs go by the shape of their slice, whose chips lie on a torus: one size per axis or plane of it.
MESH_PRESETS: dict[str, MeshPreset] = {
    "cpu": MeshPreset(1, 1, None, "CPU devices share one memory: splitting the state saves nothing"),
    "gpu-single": MeshPreset(1, 1, 1, "one GPU; any other number is an error"),
    "gpu-node": MeshPreset(
        8, 1, None, "nodes of 8 GPUs: NVLink carries the split state, gradients go between the nodes"
    ),
    "gpu-node-4": MeshPreset(4, 1, None, "the same for nodes of 4 GPUs"),
    "gpu-node-tensor": MeshPreset(
        4, 2, None, "nodes of 8 GPUs, widest towers: pairs of GPUs split the activations too"
    ),
    "tpu-2x4": MeshPreset(8, 1, 8, "one v5e or v6e host: the state is split over its 8 chips"),
    "tpu-4x4": MeshPreset(16, 1, 16, "16 chips of v5e or v6e: with 16 GB each, the state is split over all"),
    "tpu-8x8": MeshPreset(8, 1, 64, "64 chips of v5e or v6e: the state along one axis, data along the other"),
    "tpu-16x16": MeshPreset(
        16, 1, 256, "a v5e or v6e pod: the state on the rings along one axis, data along the other"
    ),
    "tpu-4x4x4": MeshPreset(16, 1, 64, "a cube of v4 or v5p: the state on planes of 4x4, data along the third axis"),
}


@dataclass(frozen=True)
class MeshConfig:
    """How the devices are arranged."""

    preset: str = key(
        "", "sizes by hardware (docs/scaling_out.md); the three sizes below then stay as they are", resume_free=True
    )
    data: int = key(-1, "devices along which only the batch is split; -1: what is left", resume_free=True)
    fsdp: int = key(1, "devices along which batch and parameters are split", resume_free=True)
    tensor: int = key(1, "devices along which heads, hidden units and vocabulary are split", resume_free=True)
    slices: int = key(
        1, "TPU slices, or groups of hosts, over whose slow links only the data axis goes", resume_free=True
    )
    max_replicated: float = key(
        0.1, "largest share of the parameters that may stay whole on an fsdp or tensor mesh", resume_free=True
    )


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Mesh with axes `data`, `fsdp`, `tensor` over all devices.

    Args:
        config: `config.mesh`.
        devices: default: all devices of all processes.

    Raises `UserError` where the sizes do not fit the devices or the links between them.
    """
    grid = arrange(config, jax.devices() if devices is None else devices)
    return Mesh(grid, MESH_AXES, axis_types=(AxisType.Auto,) * 3)


def requested_sizes(config: MeshConfig) -> tuple[int, int, int]:
    """`(data, fsdp, tensor)` as configured, at most one of them -1. `UserError` for impossible sizes or presets."""
    sizes, preset = (config.data, config.fsdp, config.tensor), config.preset
    if sizes.count(-1) > 1 or any(s < 1 and s != -1 for s in sizes):
        raise UserError(
            f"mesh (data, fsdp, tensor) = {sizes}: positive sizes, at most one of them -1 (whatever is left)"
        )
    if not preset:
        return sizes
    if preset not in MESH_PRESETS:
        raise UserError(f"mesh.preset = {preset!r}: choose one of {', '.join(MESH_PRESETS)}")
    if sizes != (-1, 1, 1):
        raise UserError(
            f"mesh.preset = {preset!r} and mesh (data, fsdp, tensor) = {sizes} are both set: use the preset, or the sizes "
            "and no preset"
        )
    return -1, MESH_PRESETS[preset].fsdp, MESH_PRESETS[preset].tensor


def mesh_sizes(config: MeshConfig, count: int) -> tuple[int, int, int]:
    """Sizes of `data`, `fsdp`, `tensor` on that many devices. `UserError` where they do not fit, or not into slices."""
    requested, slices = requested_sizes(config), config.slices
    known = math.prod(s for s in requested if s != -1)
    if count % known or (-1 not in requested and known != count):
        raise UserError(
            f"mesh (data, fsdp, tensor) = {requested} does not fit {count} device(s): their product must be "
            f"{count}; set one size to -1, e.g. --config.mesh.data=-1"
        )
    data, fsdp, tensor = (count // known if s == -1 else s for s in requested)
    if data % slices:
        raise UserError(
            f"mesh.slices = {slices} does not divide the data axis, {data}: only data may cross the slow links, so "
            f"fsdp * tensor = {fsdp * tensor} must divide the devices of a slice ({count} / {slices})"
        )
    preset = MESH_PRESETS.get(config.preset)
    if preset is not None and preset.devices not in (None, count // slices):
        raise UserError(
            f"mesh.preset = {config.preset!r} is for {preset.devices} device(s) per slice, here are {count} in "
            f"{slices} slice(s): choose another preset, or set mesh.slices"
        )
    return data, fsdp, tensor


def arrange(config: MeshConfig, devices: Sequence[jax.Device]) -> np.ndarray:
    """The devices as an array `[data, fsdp, tensor]`, neighbours on fast links.

    TPUs are laid along the physical axes of their slice, one slice after the other along `data`. Elsewhere the order is
    that of the processes, and a slice is a group of equally many consecutive processes.
    """
    sizes, slices = mesh_sizes(config, len(devices)), config.slices
    if devices[0].platform == "tpu":
        return _arrange_tpu(sizes, slices, devices)
    ordered = sorted(devices, key=lambda d: (d.process_index, d.id))
    processes = len({d.process_index for d in devices})
    if processes % slices:
        raise UserError(
            f"mesh.slices = {slices}, but there are {processes} process(es): a slice is a group of equally many of them"
        )
    groups = np.array(ordered, dtype=object).reshape(slices, -1)
    if any(len({d.process_index for d in group}) != processes // slices for group in groups):
        raise UserError(f"mesh.slices = {slices}: the processes have different numbers of devices")
    return groups.reshape(sizes)


def _arrange_tpu(sizes: tuple[int, int, int], slices: int, devices: Sequence[jax.Device]) -> np.ndarray:
    per_slice = Counter(getattr(d, "slice_index", 0) for d in devices)
    data, fsdp, tensor = sizes
    only_data = slices == 1 and fsdp * tensor == 1  # nothing else can cross a slow link then
    if len(per_slice) != slices and not only_data:
        raise UserError(
            f"mesh.slices = {slices}, but the devices lie in {len(per_slice)} TPU slice(s): set "
            f"--config.mesh.slices={len(per_slice)}, so that only the data axis goes between them"
        )
    if len(set(per_slice.values())) > 1:
        raise UserError(f"the TPU slices have different numbers of devices: {dict(per_slice)} by slice")
    slices = len(per_slice)
    within, options = (data // slices, fsdp, tensor), {"allow_split_physical_axes": True}
    try:
        if slices == 1:
            return mesh_utils.create_device_mesh(within, devices, **options)
        return mesh_utils.create_hybrid_device_mesh(within, (slices, 1, 1), devices, **options)
    except (AssertionError, NotImplementedError, ValueError) as error:
        raise UserError(
            f"mesh (data, fsdp, tensor) = {sizes} in {slices} slice(s) cannot be laid on these TPUs: {error}. Choose sizes "
            "that are products of the slice's axes (mesh.preset has some)"
        ) from error


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


def process_rows(grid: np.ndarray, process: int, batch_size: int) -> tuple[int, ...]:
    """Rows of the global batch on the devices of one process, in rising order; `grid` is `mesh.devices`.

    On TPUs they need not be contiguous: a host's chips are a square of the torus. Two processes share rows where `tensor`
    spans both.
    """
    shards = grid.shape[0] * grid.shape[1]
    if batch_size % shards:
        raise ValueError(f"{batch_size} rows cannot be split into {shards} equal parts")
    owned = np.array([any(d.process_index == process for d in devices) for devices in grid.reshape(shards, -1)])
    rows = np.arange(batch_size).reshape(shards, -1)[owned]
    return tuple(rows.ravel().tolist())


def local_rows(mesh: Mesh, batch_size: int) -> tuple[int, ...]:
    """The rows of the global batch that this process must supply."""
    return process_rows(mesh.devices, jax.process_index(), batch_size)


def to_global(local: dict[str, np.ndarray], mesh: Mesh, batch_size: int) -> dict[str, jax.Array]:
    """Host rows `local_rows(mesh, batch_size)` of every field -> global arrays sharded over the batch axis."""
    sharding = batch_sharding(mesh)
    place_of = {row: place for place, row in enumerate(local_rows(mesh, batch_size))}

    def place(array: np.ndarray) -> jax.Array:
        def rows(index: tuple[slice, ...] | None) -> np.ndarray:
            start, stop, _ = (index or (slice(None),))[0].indices(batch_size)
            first = place_of[start]
            return array[first : first + stop - start]

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


def split_axes(sharding: NamedSharding, dimensions: int) -> list[tuple[str, ...]]:
    """Mesh axes that split each dimension; axes of size 1 split nothing and are left out."""
    entries = (*sharding.spec, *(None,) * (dimensions - len(sharding.spec)))
    named = (() if entry is None else np.atleast_1d(entry).tolist() for entry in entries)
    return [tuple(axis for axis in axes if sharding.mesh.shape[axis] > 1) for axes in named]


def is_whole(array: Any) -> bool:
    """Is an array (or its shape with a `NamedSharding`) split over neither `fsdp` nor `tensor`?"""
    return not any({"fsdp", "tensor"} & set(axes) for axes in split_axes(array.sharding, array.ndim))


def whole_share(params: Any) -> float:
    """Share of the parameters (shapes with `NamedSharding`s) that every device of a `data` row holds whole."""
    leaves = jax.tree.leaves(params)
    return sum(x.size for x in leaves if is_whole(x)) / sum(x.size for x in leaves)


def check_replication(params: Any, max_replicated: float) -> None:
    """`UserError` when too many parameters stay whole on a mesh that is there to split them, with the largest of them.

    Args:
        params: shapes (or arrays) with `NamedSharding`s, e.g. `setup.abstract["params"]`.
        max_replicated: `config.mesh.max_replicated`, the largest allowed share of the number of parameters.
    """
    mesh, share = jax.tree.leaves(params)[0].sharding.mesh, whole_share(params)
    if mesh.shape["fsdp"] * mesh.shape["tensor"] == 1 or share <= max_replicated:
        return
    whole = [(p, x) for p, x in jax.tree_util.tree_leaves_with_path(params) if is_whole(x)]
    whole.sort(key=lambda item: -item[1].size)
    lines = [f"{_name(path)} {x.shape}: {_why_whole(x.shape, mesh)}" for path, x in whole[:5]]
    raise UserError(
        f"{share:.1%} of the parameters would be whole on every device of the mesh {dict(mesh.shape)}, and "
        f"mesh.max_replicated = {max_replicated:g} allows less. The largest of {len(whole)}:\n  - "
        + "\n  - ".join(lines)
        + "\nChoose mesh.fsdp and mesh.tensor that divide them, or raise mesh.max_replicated if that is meant"
    )


def _why_whole(shape: tuple[int, ...], mesh: Mesh) -> str:
    sizes = {axis: mesh.shape[axis] for axis in ("fsdp", "tensor") if mesh.shape[axis] > 1}
    text = " or ".join(f"{axis} = {size}" for axis, size in sizes.items())
    if any(n % size == 0 for n in shape for size in sizes.values()):
        return f"the logical name of no axis that {text} divides goes to it in sharding.RULES"
    return f"{text} divides none of its axes"


def _name(path: tuple[Any, ...]) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def check_names(names: Iterable[str | tuple[str, ...] | None]) -> None:
    """Raises `ValueError` for a logical axis name that no rule covers."""
    known = {name for name, _ in RULES}
    unknown = {n for n in names if n is not None and n not in known}
    if unknown:
        raise ValueError(f"logical axes {sorted(map(str, unknown))} are not in sharding.RULES; known: {sorted(known)}")


def _is_spec(x: Any) -> bool:
    return isinstance(x, PartitionSpec)

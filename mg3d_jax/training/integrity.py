"""Is a checkpoint what was saved, and is it one that this code can take? Damage and another version are told apart.

A checkpoint carries a checksum of its JSON, and in the JSON one of every array with its shape and type. The checksums of
arrays are computed on the devices as sums of integers (`checksums`): they do not depend on the mesh, need no second reading
of files, and cover all that lies between the memory of the run that saved and of the one that restores.
"""

from __future__ import annotations

import functools
import json
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from mg3d_jax.errors import UserError

CHECKSUM, ARRAY_CHECKSUMS, ARRAYS = "checksum", "array_checksums", "arrays"  # keys that `sealed` adds to the JSON
MAX_LISTED = 12

Shape = tuple[tuple[int, ...], str]  # and the dtype


class DamagedCheckpointError(Exception):
    """A checkpoint that cannot be read, or not as it was saved."""


class OtherVersionError(UserError):
    """A sound checkpoint whose parameters are not those of this code's model."""


def sealed(meta: Mapping[str, Any], state: Any) -> dict[str, Any]:
    """The JSON of a checkpoint, with what `opened` and the checks below need. All processes must call it."""
    arrays = {name: [list(shape), dtype] for name, (shape, dtype) in shapes(state).items()}
    whole = dict(meta) | {ARRAY_CHECKSUMS: checksums(state), ARRAYS: arrays}
    return whole | {CHECKSUM: _checksum(whole)}


def opened(meta: dict[str, Any]) -> dict[str, Any]:
    """The JSON without its checksum. `DamagedCheckpointError` where it is not what was saved."""
    meta = dict(meta)
    if meta.pop(CHECKSUM, None) != _checksum(meta):
        raise DamagedCheckpointError("the text in its meta folder is not what was saved")
    return meta


def without_seal(meta: Mapping[str, Any]) -> dict[str, Any]:
    """What the run itself put into the JSON."""
    return {name: value for name, value in meta.items() if name not in (CHECKSUM, ARRAY_CHECKSUMS, ARRAYS)}


def shapes(state: Any) -> dict[str, Shape]:
    """`{name: (shape, dtype)}` of a state, or of its abstract form; names as in `checksums`."""
    leaves = jax.tree_util.tree_leaves_with_path(state)
    return {jax.tree_util.keystr(path): (tuple(x.shape), str(x.dtype)) for path, x in leaves}


def check_same_arrays(meta: Mapping[str, Any], wanted: Mapping[str, Shape], *, part: bool, where: str) -> None:
    """`OtherVersionError` where a sound checkpoint has other arrays than this code's model needs.

    Args:
        wanted: `shapes` of what is to be read. `part`: the checkpoint may hold more than that.
        where: the checkpoint, for the message.
    """
    names = meta[ARRAY_CHECKSUMS].keys()
    problems = [f"{_plain(name)} {_text(wanted[name])}: not in the checkpoint" for name in wanted if name not in names]
    if not part:
        problems += [f"{_plain(name)}: only in the checkpoint" for name in names if name not in wanted]
    saved = {name: (tuple(shape), dtype) for name, (shape, dtype) in meta.get(ARRAYS, {}).items()}
    problems += _differing(saved, wanted)
    if problems:
        raise OtherVersionError(_explanation(meta, problems, where))


def check_same_shapes(
    meta: Mapping[str, Any], found: Mapping[str, Shape], wanted: Mapping[str, Shape], where: str
) -> None:
    """The same for a checkpoint of 0.1.0, whose JSON has no shapes: `found` in its files, by plain names."""
    if problems := _differing(found, {_plain(name): shape for name, shape in wanted.items()}):
        raise OtherVersionError(_explanation(meta, problems, where))


def check_values(meta: Mapping[str, Any], state: Any) -> None:
    """`DamagedCheckpointError` where the values of `state` are not those that were saved. All processes must call it."""
    saved, now = meta[ARRAY_CHECKSUMS], checksums(state)
    if changed := [name for name in now if now[name] != saved.get(name)]:
        more = f" and {len(changed) - 1} more arrays" if len(changed) > 1 else ""
        raise DamagedCheckpointError(f"the values of {changed[0]}{more} are not those that were saved")


def guarded(read: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """`read(...)`; whatever a damaged file makes orbax and tensorstore raise becomes a `DamagedCheckpointError`."""
    try:
        return read(*args, **options)
    except Exception as error:  # any type: broken JSON, missing keys, short files, bad compression, wrong shapes
        if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error):
            raise  # too little memory says nothing about the file
        lines = str(error).strip().splitlines() or [""]
        raise DamagedCheckpointError(f"{type(error).__name__}: {lines[0][:300]}") from error


def written_by(meta: Mapping[str, Any]) -> str:
    """Version and commit of the code that wrote a checkpoint, e.g. "mg3d_jax 0.1.0 (commit 049de0e)"."""
    code = meta.get("code") or {"mg3d_jax": meta.get("code_version", "of an unknown version"), "commit": None}
    return f"mg3d_jax {code['mg3d_jax']}" + (f" (commit {code['commit']})" if code["commit"] else "")


def _differing(saved: Mapping[str, Shape], wanted: Mapping[str, Shape]) -> list[str]:
    pairs = {name: (saved[name], shape) for name, shape in wanted.items() if name in saved}
    return [
        f"{_plain(name)}: {_text(a)} in the checkpoint, {_text(b)} here" for name, (a, b) in pairs.items() if a != b
    ]


def _explanation(meta: Mapping[str, Any], problems: list[str], where: str) -> str:
    more = [f"... and {len(problems) - MAX_LISTED} more"] if len(problems) > MAX_LISTED else []
    listing = "\n  - ".join(problems[:MAX_LISTED] + more)
    return (
        f"{where} is sound, but its parameters are not those of this code's model. It was written by {written_by(meta)}:"
        f"\n  - {listing}\nUse that version for this run, or start a new run from its weights (init_from.path, with "
        "init_from.take or init_from.leave for the parameters that fit)."
    )


def _plain(name: str) -> str:
    """`"['params']['kernel']" -> "params/kernel"`, `"['opt_state'][0].mu" -> "opt_state/0/mu"`."""
    return name.replace("']['", "/").replace("['", "/").replace("']", "").replace("[", "/").replace("]", "").replace(
        ".", "/"
    ).lstrip("/")  # fmt: skip


def _text(shape: Shape) -> str:
    return f"{list(shape[0])} {shape[1]}"


def _checksum(meta: Mapping[str, Any]) -> int:
    return zlib.crc32(json.dumps(meta, sort_keys=True).encode())


def checksums(tree: Any) -> dict[str, int]:
    """`{path of an array: 32 bits}`, the same on every mesh. All processes must call it.

    The sum modulo 2^32 of one number per element, in which its bits and its position are mixed one-to-one (the finalizer of
    MurmurHash3). So a change of one element never goes unseen, and any other change or exchange with probability 2^-32.
    """
    paths, leaves = zip(*jax.tree_util.tree_flatten_with_path(tree)[0], strict=True)
    mesh = leaves[0].sharding.mesh if isinstance(leaves[0].sharding, NamedSharding) else None
    whole = NamedSharding(mesh, PartitionSpec()) if mesh is not None else None
    sums = jax.device_get(_sums(whole)(leaves))
    return {jax.tree_util.keystr(path): int(value) for path, value in zip(paths, sums, strict=True)}


@functools.cache
def _sums(whole: NamedSharding | None) -> Callable[[Sequence[jax.Array]], jax.Array]:
    """Jitted: arrays -> uint32 [number of arrays], which every process has."""
    return jax.jit(lambda leaves: jnp.stack([_sum(leaf) for leaf in leaves]), out_shardings=whole)


@jax.jit  # traced once for all arrays of one shape
def _sum(x: jax.Array) -> jax.Array:
    bits = jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * x.dtype.itemsize}")).astype(jnp.uint32)
    position, stride = jnp.uint32(0), 1
    for axis in reversed(range(x.ndim)):
        position += jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis) * jnp.uint32(stride % 2**32)
        stride *= x.shape[axis]
    mixed = bits + position * jnp.uint32(0x9E3779B9)
    mixed = (mixed ^ (mixed >> 16)) * jnp.uint32(0x85EBCA6B)
    mixed = (mixed ^ (mixed >> 13)) * jnp.uint32(0xC2B2AE35)
    return jnp.sum(mixed ^ (mixed >> 16), dtype=jnp.uint32)

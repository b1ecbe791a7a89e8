"""Is a checkpoint what was saved, and is it one that this code can take? Damage and another version are told apart.

A checkpoint carries a checksum of its JSON, and in the JSON one of every array with its shape and type. The checksums of
arrays are computed on the devices as sums of integers (`checksums`): they do not depend on the mesh, need no second reading
of files, and cover all that lies between the memory of the run that saved and of the one that restores.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Mapping
from typing import Any

import jax

from mg3d_jax.errors import UserError
from mg3d_jax.training.checksums import checksums

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

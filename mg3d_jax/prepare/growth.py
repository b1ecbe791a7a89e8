"""What is left to do in a folder: new volumes are added, excluded ones leave, what changed or was damaged is done again.

A folder keeps the order of the records that it has. Volumes of a patient who is there join his; new patients come behind, in
shards of their own: nested subsets stay nested. `work/layout.json` says, once a folder has grown, which volume is in which
shard; before that it follows from the input alone. A shard that changes keeps its other records, byte for byte.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mg3d_jax.errors import UserError
from mg3d_jax.files import read_json, write_json
from mg3d_jax.prepare.listing import Example
from mg3d_jax.prepare.recipe import PLAN_NAME, WORK_FOLDER
from mg3d_jax.prepare.shards import (
    begun_at,
    input_digest,
    key_of,
    ordered,
    read_sidecars,
    shard_names,
    sidecar_examples,
    source_state,
    untouched,
    worth_redoing,
    written_after,
)
from mg3d_jax.prepare.snapshots import kept_shard
from mg3d_jax.progress import track

logger = logging.getLogger(__name__)

_LAYOUT_NAME = "layout.json"
_SHOWN = 5  # names that a line says
COMPARE = ("time", "size", "checksum")


@dataclass
class Work:
    """What one call of `prepare` will do."""

    chunks: dict[str, list[Example]]  # of every shard, in order
    layout: dict[str, Any] | None  # to be written before anything changes; None where it follows from the input
    redo: dict[str, set[str]] = field(default_factory=dict)  # shard -> keys whose records it can keep
    leaving: list[str] = field(default_factory=list)  # shards without a volume from now on
    said: list[str] = field(default_factory=list)  # what will be done, and why
    alters: bool = False  # records of a finished folder change
    read: list[str] = field(default_factory=list)  # shards that were read and are as their sidecars say

    def todo(self, sidecars: dict[str, dict[str, Any]]) -> list[str]:
        """Shards that are to be written."""
        return [name for name in self.chunks if name not in sidecars or name in self.redo]


def plan_work(out: Path, examples: list[Example], shard_records: int, root: Path, compare: str) -> Work:
    """Reads the folder and says what is missing in it for these examples. Writes nothing.

    Args:
        root: paths of examples are compared relative to it.
        compare: by what a source counts as changed, of `COMPARE`.
    """
    examples = ordered(examples)
    digest = input_digest(examples, root)
    plan_path, layout_path = out / WORK_FOLDER / PLAN_NAME, out / WORK_FOLDER / _LAYOUT_NAME
    begun = read_json(plan_path).get("input") if plan_path.is_file() else None
    layout = read_json(layout_path, remedy=f"delete {out} to start anew") if layout_path.is_file() else None
    by_key = {key_of(example): example for example in examples}
    if len(by_key) < len(examples):
        raise UserError(f"two volumes of one patient have the same name: {_twice(examples)}; name them apart")
    if layout is not None and layout["input"] == digest:
        chunks = {name: [by_key[key] for key in keys] for name, keys in layout["shards"].items()}
        work = Work(chunks, None)
    elif layout is None and begun in (None, digest):
        parts = [examples[start : start + shard_records] for start in range(0, len(examples), shard_records)]
        work = Work(dict(zip(shard_names(len(parts)), parts, strict=True)), None)
    else:
        work = _grown(out, layout, examples, by_key, shard_records, root, str(begun), digest)
        layout = work.layout
    _add_stale(work, out, root, compare, trusted=layout["trusted"] if layout else None)
    return work


def _twice(examples: list[Example]) -> str:
    keys = [key_of(example) for example in examples]
    return next(key for key in keys if keys.count(key) > 1).replace("\t", "/")


def _known(out: Path, layout: dict[str, Any] | None, examples: list[Example]) -> dict[str, list[str]]:
    """Shard -> keys of the volumes that it was made of, in the folder's order."""
    names = sorted(path.stem for path in (out / WORK_FOLDER).glob("records-*.json"))
    sidecars = read_sidecars(out, names)
    if layout is not None:
        return dict(layout["shards"])
    return {name: _keys(sidecars[name], examples) for name in names if name in sidecars}


def _keys(sidecar: dict[str, Any], examples: list[Example]) -> list[str]:
    """Keys of the volumes of a shard; one of an earlier version says of its bad volumes only the path."""
    known = sidecar_examples(sidecar)
    if "examples" in sidecar:
        return list(known)
    bad = {Path(item["path"]).name for item in sidecar["bad"]}
    return [key_of(e) for e in examples if key_of(e) in known or e.path.name in bad]


def _grown(
    out: Path,
    layout: dict[str, Any] | None,
    examples: list[Example],
    by_key: dict[str, Example],
    shard_records: int,
    root: Path,
    begun: str,
    digest: str,
) -> Work:
    """The layout for another input than the folder's."""
    known = _known(out, layout, examples)
    placed = {key for keys in known.values() for key in keys}
    home = {key.split("\t")[0]: name for name, keys in known.items() for key in keys}  # patient -> his last shard
    new = [example for example in examples if key_of(example) not in placed]
    chunks: dict[str, list[Example]] = {}
    for name, keys in known.items():
        members = [by_key[key] for key in keys if key in by_key]
        joining = [example for example in new if home.get(example.patient) == name]
        chunks[name] = _joined(members, joining, keys)
    leaving = [name for name, members in chunks.items() if not members]
    rest = [example for example in new if example.patient not in home]
    parts = [rest[start : start + shard_records] for start in range(0, len(rest), shard_records)]
    first = 1 + max((int(re.findall(r"\d+", name)[0]) for name in known), default=-1)
    chunks = {name: members for name, members in chunks.items() if members}
    chunks |= {f"records-{first + i:05d}-of-{first + len(parts):05d}": part for i, part in enumerate(parts)}
    # Shards of earlier versions do not say what their volumes were: the input of the whole does.
    before = [by_key[key] for keys in known.values() for key in keys if key in by_key]
    same = layout is None and input_digest(ordered(before), root) == begun
    trusted = layout["trusted"] if layout else (list(known) if same else [])
    shards = {name: [key_of(example) for example in members] for name, members in chunks.items()}
    work = Work(chunks, {"input": digest, "shards": shards, "trusted": trusted}, leaving=leaving, alters=True)
    gone = [key for key in placed if key not in by_key]
    work.said += _line("new", [example.name for example in new])
    work.said += _line("left out now", [key.split("\t")[1] for key in sorted(gone)])
    return work


def _joined(members: list[Example], joining: list[Example], keys: list[str]) -> list[Example]:
    """Members of a shard with new volumes beside those of their patients, by name."""
    patients = list(dict.fromkeys(key.split("\t")[0] for key in keys))
    every = [*members, *joining]
    if not joining:
        return members
    return [e for patient in patients for e in sorted((e for e in every if e.patient == patient), key=lambda e: e.name)]


def _add_stale(work: Work, out: Path, root: Path, compare: str, trusted: list[str] | None) -> None:
    """Adds to `work.redo` the shards that are not what they should be, and says why."""
    sidecars = read_sidecars(out, list(work.chunks))
    kept = _kept_shards(work, out, sidecars, every=compare == "checksum")
    changed: list[str] = []
    damaged: list[str] = []
    retried: list[str] = []
    for name, sidecar in sidecars.items():
        chunk = work.chunks[name]
        known = sidecar_examples(sidecar)
        old = "examples" not in sidecar and (trusted is None or name in trusted)
        if "examples" not in sidecar:
            known |= {key: [] for key in _keys(sidecar, chunk) if key not in known}
        other = {
            key_of(e) for e in chunk if not _same(e, known.get(key_of(e)), root, compare, begun_at(out, name), old)
        }
        other |= _decided_otherwise(sidecar) & known.keys()
        whole = kept[name] is not None
        moved = whole and kept[name] != out / sidecar["file"]
        retry = worth_redoing(out, name, sidecar, chunk)
        if not other and whole and not moved and not retry and len(known) == len(chunk):
            continue
        work.redo[name] = {key_of(e) for e in chunk} - other if whole else set()
        changed += [key.split("\t")[1] for key in sorted(other) if key in known]
        damaged += [] if whole else [sidecar["file"]]
        retried += [name] if retry and not other else []
    work.alters |= bool(changed or retried)
    work.said += _line("changed since", changed) + _line("damaged or lost shards", damaged)
    work.said += _line("shards with bad volumes that may be whole by now", retried)


def _kept_shards(work: Work, out: Path, sidecars: dict[str, dict[str, Any]], *, every: bool) -> dict[str, Path | None]:
    """Shard -> `kept_shard`. Reads those that were written to or moved since they were last read, or `every` one."""
    unread = [name for name, one in sidecars.items() if one["records"] and (every or not untouched(out, one))]
    kept: dict[str, Path | None] = {
        name: out / one["file"] for name, one in sidecars.items() if name not in set(unread)
    }
    for name in track(unread, "prepare: checksums", len(unread), unit="shards") if unread else ():
        kept[name] = kept_shard(out, sidecars[name])
    work.read = [name for name in unread if kept[name] == out / sidecars[name]["file"]]
    return kept


def _decided_otherwise(sidecar: dict[str, Any]) -> set[str]:
    """Keys of the volumes whose header disagreed with the table and was taken without evidence, as earlier versions did."""
    return {
        f"{entry['patient']}\t{entry['name']}"
        for entry, quality in zip(sidecar["entries"], sidecar["quality"], strict=True)
        if any(warning.endswith("disagree: header used") for warning in quality["warnings"])
    }


def _same(example: Example, known: list[Any] | None, root: Path, compare: str, begun: float, old: bool) -> bool:
    """Whether the record that was made of an example is what would be made of it now, as far as can be seen."""
    if known is None:
        return False
    if not known:
        return old  # earlier versions did not say what a volume was made of
    digest, *state = known
    if digest != input_digest([example], root):
        return False
    now = source_state(example.path, checksum=compare == "checksum")
    if now is None or state[0] is None:  # fetched, or deleted since
        return True
    if compare == "checksum" and state[1] is not None:
        return now == state
    return now[0] == state[0] and (compare == "size" or not written_after(example.path, begun))


def _line(what: str, names: Iterable[str]) -> list[str]:
    names = list(names)
    if not names:
        return []
    more = f", ... {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return [f"{len(names)} {what}: {', '.join(names[:_SHOWN])}{more}"]


def write_layout(out: Path, work: Work) -> None:
    """Makes the new layout that of the folder: first it, then the plan; a kill between them loses nothing."""
    if work.layout is None:
        return
    write_json(out / WORK_FOLDER / _LAYOUT_NAME, work.layout)
    plan = read_json(out / WORK_FOLDER / PLAN_NAME)
    write_json(out / WORK_FOLDER / PLAN_NAME, plan | {"input": work.layout["input"]})


def drop_shards(out: Path, names: list[str]) -> None:
    for name in names:
        (out / f"{name}.array_record").unlink(missing_ok=True)
        (out / WORK_FOLDER / f"{name}.json").unlink(missing_ok=True)

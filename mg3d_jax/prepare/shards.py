"""Examples -> records in worker processes -> shards, each with a sidecar (a JSON file about it), resumable at every shard.

Which example goes into which shard follows from the input alone, so that a run that was killed and started again, or
split over machines, gives the same bytes. A shard whose sidecar lies in `work/` is done, unless a volume it lost may
be whole by now (`worth_redoing`); nothing else is state.
"""

from __future__ import annotations

import errno
import hashlib
import logging
import math
import multiprocessing
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from array_record.python.array_record_module import ArrayRecordReader

from mg3d_jax.data.record import Record, encode
from mg3d_jax.data.records import ShardWriter, file_digest
from mg3d_jax.errors import UserError
from mg3d_jax.files import read_json, remove_partials, write_json
from mg3d_jax.prepare.fetch import FETCH_FAILED, fetched
from mg3d_jax.prepare.geometry import Grid
from mg3d_jax.prepare.listing import Example
from mg3d_jax.prepare.nifti import VolumeError
from mg3d_jax.prepare.recipe import WORK_FOLDER
from mg3d_jax.prepare.reports import report_id, report_sentences
from mg3d_jax.prepare.volumes import prepare_volume

logger = logging.getLogger(__name__)

SYSTEM_FAILED = "system error"  # how the reason begins where the machine is to blame, not the file
_PASSING = (FETCH_FAILED, SYSTEM_FAILED)


@dataclass(frozen=True)
class Recipe:
    """How one example becomes one record; what a worker process needs to know."""

    grid: Grid
    window: tuple[float, float] | None = None  # HU of 0 and 255 where volumes are stored as uint8
    zstd_level: int = 3  # 0: volumes are not packed
    fetch: str | None = None  # command that brings a volume (see fetch.py)
    mask_classes: int = 0  # values of masks are below it
    checksum: bool = False  # of every source, for `--compare checksum`


@dataclass(frozen=True)
class Outcome:
    """What became of one example: `data` (an encoded record), or `reason` why there is none."""

    data: bytes | None
    entry: dict[str, Any]  # its line of index.jsonl
    quality: dict[str, Any] | None
    reason: str | None
    state: list[Any] | None = None  # `source_state` before it was read


def ordered(examples: Iterable[Example]) -> list[Example]:
    """Record order: patients by the hash of their id, so that the first K are a random, nested subset; each patient's
    volumes together, by name."""
    return sorted(examples, key=lambda e: (hashlib.sha256(e.patient.encode()).digest(), e.patient, e.name))


def prepare_example(example: Example, recipe: Recipe) -> Outcome:
    """Reads one volume and encodes its record. Never raises for a bad volume: the outcome carries the reason. `UserError` where
    the machine has reached a limit that stops every other volume too."""
    entry: dict[str, Any] = {
        "name": example.name,
        "patient": example.patient,
        "report_id": report_id(example.findings, example.impression),
    }
    sentences = report_sentences(example.findings, example.impression)
    if not sentences and example.has_report:
        return Outcome(None, entry, None, "empty report")
    state = source_state(example.path, checksum=recipe.checksum)
    try:
        with fetched(example, recipe.fetch) as path:
            prepared = prepare_volume(
                path, recipe.grid, example.metadata, mask=example.mask, mask_classes=recipe.mask_classes
            )
    except Exception as error:  # one unusual file must not end a run of days: it is listed, with its path
        if isinstance(error, UserError):
            raise
        if limit := _limit(error):
            raise UserError(f"{example.path}: {limit}; the same command goes on from here") from error
        reason = str(error) if isinstance(error, VolumeError) else f"failed with {type(error).__name__}: {error}"
        return Outcome(None, entry, None, f"{SYSTEM_FAILED}: {reason}" if _may_pass(error) else reason, state)
    record = Record(
        volume=prepared.volume,
        sentences=sentences,
        labels=np.array(example.labels, np.int8),
        name=example.name,
        patient=example.patient,
        scan=example.scan,
        report_id=entry["report_id"],
        affine=prepared.affine,
        findings=example.findings,
        impression=example.impression,
        source=example.source,
        mask=prepared.mask,
    )
    entry["affine"] = prepared.affine.round(6).tolist()  # voxel of the record -> mm of the scan
    entry["content"] = hashlib.blake2b(prepared.volume.data, digest_size=16).hexdigest()
    quality = {"path": str(example.path), "name": example.name, **prepared.quality}
    return Outcome(encode(record, recipe.window, zstd_level=recipe.zstd_level), entry, quality, None, state)


def _limit(error: Exception) -> str:
    """Which limit of the machine was reached, and what to do; "" for none."""
    codes = {e.errno for e in (error, error.__cause__) if isinstance(e, OSError)}
    if codes & {errno.EMFILE, errno.ENFILE}:
        return "too many open files: raise the limit (ulimit -n 4096), or use fewer --workers"
    if codes & {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}:
        return (
            "the disk is full, or a quota or limit of file sizes is reached: make room, or set TMPDIR to another disk"
        )
    return ""


def _may_pass(error: Exception) -> bool:
    """Memory that ran out, or a call that the system refused. Decoders raise `OSError` too, but without its number."""
    causes = (error, error.__cause__)
    return any(isinstance(e, MemoryError) or (isinstance(e, OSError) and e.errno is not None) for e in causes)


def _exit_with_parent() -> None:
    """In a worker: end when the main process is gone, however it went (SIGKILL leaves it no time to say so)."""
    parent = multiprocessing.parent_process()

    if parent is None:  # not a worker
        return

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def kept_outcomes(path: Path, sidecar: dict[str, Any], keys: set[str]) -> dict[str, Outcome]:
    """Key -> outcome of those records of a shard's file that stay as they are."""
    if not keys or not sidecar["records"]:
        return {}
    reader = ArrayRecordReader(str(path))
    try:
        records = reader.read_all()
    finally:
        reader.close()
    states, kept = sidecar_examples(sidecar), {}
    for data, entry, quality in zip(records, sidecar["entries"], sidecar["quality"], strict=True):
        key = f"{entry['patient']}\t{entry['name']}"
        if key in keys:
            kept[key] = Outcome(data, entry, quality, None, states.get(key, [])[1:] or None)
    return kept


def with_kept(
    chunk: list[Example], kept: dict[str, Outcome], results: Iterator[tuple[Example, Outcome]]
) -> Iterator[tuple[Example, Outcome]]:
    """Outcomes of a shard in its order: kept ones, and those of `results` for the others."""
    for example in chunk:
        outcome = kept.get(key_of(example))
        yield (example, outcome) if outcome is not None else next(results)


def outcomes(examples: list[Example], recipe: Recipe, workers: int) -> Iterator[tuple[Example, Outcome]]:
    """Outcomes in the order of the examples; a few per worker are in flight, so that memory stays bounded."""
    if workers <= 1 or len(examples) <= 1:
        for example in examples:
            yield example, prepare_example(example, recipe)
        return
    context = multiprocessing.get_context("forkserver")
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_exit_with_parent)
    pending: deque[tuple[Example, Any]] = deque()
    waiting = iter(examples)
    try:
        while True:
            while len(pending) < 3 * workers and (following := next(waiting, None)) is not None:
                pending.append((following, pool.submit(prepare_example, following, recipe)))
            if not pending:
                return
            example, future = pending.popleft()
            yield example, future.result()
    except BrokenProcessPool as error:
        paths = [str(example.path), *(str(other.path) for other, _ in pending)]
        raise UserError(
            f"a worker process died (out of memory?) on one of {paths}; run again with fewer --workers"
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def key_of(example: Example) -> str:
    """The name of an example in a folder: its patient and its own."""
    return f"{example.patient}\t{example.name}"


def source_state(path: Path, *, checksum: bool = False) -> list[Any] | None:
    """[bytes, sha256 or None] of a volume (file, or folder of slices); `None` where there is none. Without the time: the
    sidecar's own tells what changed later, and a preparation gives the same bytes again."""
    try:
        parts = sorted(path.iterdir()) if path.is_dir() else [path]
        size = sum(os.stat(part).st_size for part in parts)
        digest = hashlib.sha256("".join(map(file_digest, parts)).encode()).hexdigest() if checksum else None
    except OSError:
        return None
    return [size, digest]


def written_after(path: Path, begun: float) -> bool:
    """Whether the content of a volume is younger than `begun`, seconds since 1970."""
    try:
        parts = list(path.iterdir()) if path.is_dir() else [path]
        return any(os.stat(part).st_mtime > begun for part in parts)
    except OSError:
        return False


def untouched(out: Path, sidecar: dict[str, Any]) -> bool:
    """Whether the file of a shard has its size, and neither its content nor its inode is younger than the inode of its sidecar,
    which is written last and again by `confirm`: no program sets that time at will, unlike that of the content."""
    path = out / sidecar["file"]
    try:
        shard, beside = os.stat(path), os.stat(_sidecar_path(out, path.stem))
    except OSError:
        return False
    return shard.st_size == sidecar["bytes"] and max(shard.st_mtime_ns, shard.st_ctime_ns) < beside.st_ctime_ns


def confirm(out: Path, names: Iterable[str]) -> None:
    """From now on the shards are `untouched`: their files were read and are what their sidecars say."""
    for name in names:
        with suppress(OSError):  # a folder that may only be read
            status = os.stat(_sidecar_path(out, name))
            os.utime(_sidecar_path(out, name), ns=(status.st_atime_ns, status.st_mtime_ns))


def begun_at(out: Path, name: str) -> float:
    """When the making of a shard began, seconds since 1970."""
    return _sidecar_path(out, name).stat().st_mtime


def sidecar_examples(sidecar: dict[str, Any]) -> dict[str, list[Any]]:
    """Key -> [digest of what the source said, then its `source_state`] of the volumes of a shard, in order. Sidecars of earlier
    versions have no digests: the lists are empty, and bad volumes are not among them."""
    if "examples" in sidecar:
        return dict(sidecar["examples"])
    return {f"{entry['patient']}\t{entry['name']}": [] for entry in sidecar["entries"]}


def shard_names(count: int) -> list[str]:
    return [f"records-{index:05d}-of-{count:05d}" for index in range(count)]


def input_digest(examples: list[Example], root: Path) -> str:
    """Digest of everything that the sources said, paths relative to the root: a moved data set is the same input.

    Begun preparations hold it, so the text that goes into it stays: a field that is added to `Metadata` is declared with
    `field(repr=False)`, and joined to the text where a source sets it."""
    digest = hashlib.sha256()
    for e in examples:
        path, said = os.path.relpath(e.path, root), e.metadata.said()
        texts = (path, e.name, e.patient, e.scan, e.findings, e.impression, e.labels)
        digest.update(f"({', '.join(map(repr, texts))}, {said})".encode())
        if e.mask is not None:
            digest.update(os.path.relpath(e.mask, root).encode())
    return digest.hexdigest()


def _sidecar_path(out: Path, name: str) -> Path:
    return out / WORK_FOLDER / f"{name}.json"


def read_sidecars(out: Path, names: list[str]) -> dict[str, dict[str, Any]]:
    """Sidecars of the finished shards. One that cannot be read is none, and a warning says so."""
    found = {}
    for name in names:
        path = _sidecar_path(out, name)
        if path.is_file():
            try:
                found[name] = read_json(path)
            except UserError as error:
                logger.warning("prepare: %s: its shard counts as not done", error)
    return found


def _changed_at(path: Path) -> float:
    """When a volume (file or folder of slices) last changed, seconds since 1970; -inf where there is none. The inode's
    time counts too: a file that is moved or copied into place may keep an old time of its content."""
    try:
        parts = [path, *path.iterdir()] if path.is_dir() else [path]
        return max(max(status.st_mtime, status.st_ctime) for status in map(os.stat, parts))
    except OSError:
        return -math.inf


def worth_redoing(out: Path, name: str, sidecar: dict[str, Any], examples: list[Example]) -> bool:
    """Whether a shard of `examples` that is done may come out with more records: a volume that was bad has changed or
    appeared since the shard was begun, or the network or the machine was to blame, which may be better now."""
    begun = _sidecar_path(out, name).stat().st_mtime
    reasons = {Path(item["path"]).name: item["reason"] for item in sidecar["bad"]}
    if any(reason.startswith(_PASSING) for reason in reasons.values()):
        return True
    # By name, because the data set may have moved.
    lost = [example.path for example in examples if example.path.name in reasons]
    return any(_changed_at(path) > begun or (reasons[path.name] == "no such file" and path.exists()) for path in lost)


def write_shard(
    out: Path,
    name: str,
    results: Iterator[tuple[Example, Outcome]],
    count: int,
    each: Callable[[Outcome], None],
    begun: float,
    root: Path | None = None,
) -> dict[str, Any]:
    """Writes the next `count` results as one shard with its sidecar, which it returns. `each` is told every outcome.

    begun: a time before the first volume was read, seconds since 1970. The sidecar's file bears it: a volume that
    changed later may have been read before it changed.
    root: of the data set; the sidecar then says what each volume was made of."""
    path, sidecar_path = out / f"{name}.array_record", _sidecar_path(out, name)
    for ours in (path, sidecar_path):
        remove_partials(ours)
    sidecar: dict[str, Any] = {"file": path.name, "records": 0, "entries": [], "bad": [], "quality": []}
    if root is not None:
        sidecar["examples"] = {}
    writer = ShardWriter(path)
    try:
        for _ in range(count):
            example, outcome = next(results)
            if outcome.data is None:
                sidecar["bad"].append({"path": str(example.path), "reason": outcome.reason})
            else:
                writer.write(outcome.data)
                sidecar["records"] += 1
                sidecar["entries"].append(outcome.entry)
                sidecar["quality"].append(outcome.quality)
            if root is not None:
                sidecar["examples"][key_of(example)] = [input_digest([example], root), *(outcome.state or [None] * 2)]
            each(outcome)
    except BaseException:
        writer.abandon()
        raise
    if sidecar["records"]:
        writer.close()
        sidecar |= {"bytes": path.stat().st_size, "sha256": file_digest(path)}
    else:
        writer.abandon()
        path.unlink(missing_ok=True)  # of an earlier attempt, some of whose volumes are gone now
    write_json(sidecar_path, sidecar)
    os.utime(sidecar_path, (begun, begun))
    return sidecar

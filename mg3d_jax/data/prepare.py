"""`mg3d prepare`: volumes and reports on disk -> checked, sharded training records with a manifest.

    sources -> ordered examples -> fixed shards -> (worker processes: volumes, reports, records) -> shards + manifest

The plan (which example goes into which shard) follows from the input alone, so that a run that was killed and started
again, or split over machines, gives the same bytes. A finished shard has a sidecar in `work/`; the manifest comes last.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import os
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mg3d_jax.data.manifest import build_manifest, code_version, write_json, write_manifest
from mg3d_jax.data.nifti import VolumeError
from mg3d_jax.data.records import Record, ShardWriter, encode, file_digest
from mg3d_jax.data.reports import report_id, report_sentences
from mg3d_jax.data.sources import SOURCES, Example, Listing
from mg3d_jax.data.volumes import Grid, prepare_volume
from mg3d_jax.errors import UserError
from mg3d_jax.progress import Progress

WORK_FOLDER = "work"
_SHOWN_BAD = 10


@dataclass(frozen=True)
class Settings:
    """One preparation. `size` in voxels and `spacing` in mm are in RAS+ order."""

    source: str
    root: Path
    split: str
    out: Path
    size: tuple[int, int, int] = (128, 128, 96)
    spacing: tuple[float, float, float] = (2.8, 2.8, 3.5)
    workers: int = 1
    max_bad_share: float = 0.1
    shard_records: int = 256
    zstd_level: int = 3

    def plan(self) -> dict[str, Any]:
        """The settings that decide the bytes of the records."""
        return {
            "source": self.source,
            "split": self.split,
            "root": str(self.root),
            "size": list(self.size),
            "spacing": list(self.spacing),
            "shard_records": self.shard_records,
            "zstd_level": self.zstd_level,
            "code_version": code_version(),
        }


@dataclass(frozen=True)
class Outcome:
    """What became of one example: `data` (an encoded record), or `reason` why there is none."""

    data: bytes | None
    entry: dict[str, str]
    quality: dict[str, Any] | None
    reason: str | None


def ordered(examples: Iterable[Example]) -> list[Example]:
    """Record order: patients by the hash of their id, so that the first K are a random, nested subset; each patient's
    volumes together, by name."""
    return sorted(examples, key=lambda e: (hashlib.sha256(e.patient.encode()).digest(), e.patient, e.name))


def prepare_example(example: Example, grid: Grid) -> Outcome:
    """Reads one volume and encodes its record. Never raises for a bad volume: the outcome carries the reason."""
    entry = {
        "name": example.name,
        "patient": example.patient,
        "report_id": report_id(example.findings, example.impression),
    }
    sentences = report_sentences(example.findings, example.impression)
    if not sentences:
        return Outcome(None, entry, None, "empty report")
    try:
        prepared = prepare_volume(example.path, grid, example.metadata)
    except VolumeError as error:
        return Outcome(None, entry, None, str(error))
    except Exception as error:  # one odd file must not end a run of days: it is listed, with its path
        return Outcome(None, entry, None, f"failed with {type(error).__name__}: {error}")
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
    )
    quality = {"path": str(example.path), "name": example.name, **prepared.quality}
    return Outcome(encode(record), entry, quality, None)


def _outcomes(examples: list[Example], grid: Grid, workers: int) -> Iterator[tuple[Example, Outcome]]:
    """Outcomes in the order of the examples; at most a few per worker are in flight, so that memory stays bounded."""
    if workers <= 1:
        for example in examples:
            yield example, prepare_example(example, grid)
        return
    context = multiprocessing.get_context("forkserver")
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        pending: deque[tuple[Example, Any]] = deque()
        waiting = iter(examples)
        try:
            while True:
                while len(pending) < 3 * workers and (example := next(waiting, None)) is not None:
                    pending.append((example, pool.submit(prepare_example, example, grid)))
                if not pending:
                    return
                example, future = pending.popleft()
                yield example, future.result()
        except BrokenProcessPool as error:
            paths = [str(example.path), *(str(other.path) for other, _ in pending)][: 3 * workers]
            raise UserError(
                f"a worker process died (out of memory?) on one of {paths}; run again with fewer --workers"
            ) from error
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _shard_name(index: int, count: int) -> str:
    return f"records-{index:05d}-of-{count:05d}"


def _start(settings: Settings, listing: Listing, chunks: list[list[Example]]) -> None:
    """Creates the output folder, or checks that what lies there is the same preparation."""
    work = settings.out / WORK_FOLDER
    work.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256()
    for chunk in chunks:
        for example in chunk:
            digest.update(repr(example).encode())
    plan = settings.plan() | {"input": digest.hexdigest(), "label_names": list(listing.label_names)}
    path = work / "plan.json"
    if path.is_file():
        previous = json.loads(path.read_text())
        if changed := sorted(key for key in plan.keys() | previous.keys() if plan.get(key) != previous.get(key)):
            raise UserError(
                f"{settings.out} holds a preparation that differs in {changed}: choose another --out, or delete it"
            )
    else:
        write_json(path, plan)
    for leftover in settings.out.glob(".*.partial"):
        leftover.unlink(missing_ok=True)


def _write_shard(
    settings: Settings, name: str, outcomes: Iterator[tuple[Example, Outcome]], count: int, progress: Progress, bad: int
) -> dict[str, Any]:
    """Writes the next `count` outcomes as one shard with its sidecar. `bad` is the number of bad ones so far."""
    path = settings.out / f"{name}.array_record"
    sidecar: dict[str, Any] = {"file": path.name, "records": 0, "entries": [], "bad": [], "quality": []}
    writer = ShardWriter(path, zstd_level=settings.zstd_level)
    try:
        for _ in range(count):
            example, outcome = next(outcomes)
            if outcome.data is None:
                sidecar["bad"].append({"path": str(example.path), "reason": outcome.reason})
            else:
                writer.write(outcome.data)
                sidecar["records"] += 1
                sidecar["entries"].append(outcome.entry)
                sidecar["quality"].append(outcome.quality)
            found = bad + len(sidecar["bad"])
            progress.advance(1, note=f"{found} bad" if found else "")
    except BaseException:
        writer.abandon()
        raise
    if sidecar["records"]:
        writer.close()
        sidecar |= {"bytes": path.stat().st_size, "sha256": file_digest(path)}
    else:
        writer.abandon()
    write_json(settings.out / WORK_FOLDER / f"{name}.json", sidecar)
    return sidecar


def _check_bad(settings: Settings, bad: list[dict[str, str]], total: int) -> None:
    """Raises `UserError` when nothing is left or too much is bad; the whole list goes to `bad.json`."""
    share = len(bad) / total if total else 1.0
    if total and len(bad) < total and share <= settings.max_bad_share:
        return
    settings.out.mkdir(parents=True, exist_ok=True)
    write_json(settings.out / "bad.json", bad)
    shown = "\n".join(f"  {item['path']}: {item['reason']}" for item in bad[:_SHOWN_BAD])
    more = f"\n  ... all of them in {settings.out / 'bad.json'}" if len(bad) > _SHOWN_BAD else ""
    if len(bad) >= total:
        raise UserError(f"nothing is left to prepare: {len(bad)} of {total} are bad\n{shown}{more}")
    raise UserError(
        f"{len(bad)} of {total} ({share:.0%}) are bad, above --max-bad-share {settings.max_bad_share}\n{shown}{more}\n"
        "mend them, or allow more with --max-bad-share"
    )


def summary(manifest: dict[str, Any]) -> str:
    """What was prepared, for people."""
    size, shards = sum(shard["bytes"] for shard in manifest["shards"]) / 1e6, len(manifest["shards"])
    lines = [
        f"{manifest['records']} records of {len(manifest['patients'])} patients, {manifest['unique_reports']} distinct "
        f"reports, grid {manifest['grid']} at {manifest['spacing']} mm, {size:.1f} MB in {shards} shards",
        *manifest["notes"],
        *(f"{count} left out: {rule}" for rule, count in manifest["skipped"].items()),
    ]
    if manifest["warnings"]:
        lines.append(f"{manifest['warnings']} volumes with a warning (see qa.jsonl)")
    if bad := manifest["bad"]:
        lines.append(f"{len(bad)} bad, listed in manifest.json:")
        reasons = Counter(item["reason"].split(":")[0] for item in bad)
        lines += [f"  {count} x {reason}" for reason, count in reasons.most_common()]
    return "\n".join(lines)


def prepare(settings: Settings) -> dict[str, Any]:
    """Prepares a whole data set and returns its manifest. Called again after an interruption it goes on where it was.
    Raises `UserError` for a missing table, other settings in `out`, nothing left, or too large a bad share."""
    if settings.source not in SOURCES:
        raise UserError(f"--source {settings.source!r}: there are {sorted(SOURCES)}")
    if not Path(settings.root).is_dir():
        raise UserError(f"--root {settings.root} is not a folder")
    listing = SOURCES[settings.source](Path(settings.root), settings.split)
    total = len(listing.examples) + len(listing.bad)
    _check_bad(settings, listing.bad, total)
    examples = ordered(listing.examples)
    step = settings.shard_records
    chunks = [examples[start : start + step] for start in range(0, len(examples), step)]
    _start(settings, listing, chunks)
    names = [_shard_name(index, len(chunks)) for index in range(len(chunks))]
    sidecars: dict[str, dict[str, Any]] = {}
    for name in names:
        path = settings.out / WORK_FOLDER / f"{name}.json"
        if path.is_file():
            sidecars[name] = json.loads(path.read_text())
    todo = [(name, chunk) for name, chunk in zip(names, chunks, strict=True) if name not in sidecars]
    done = len(examples) - sum(len(chunk) for _, chunk in todo)
    grid = Grid(tuple(settings.size), tuple(settings.spacing))
    outcomes = _outcomes([example for _, chunk in todo for example in chunk], grid, settings.workers)
    with Progress("prepare", total=len(examples), unit="volumes", initial=done) as progress:
        for name, chunk in todo:
            bad = len(listing.bad) + sum(len(sidecar["bad"]) for sidecar in sidecars.values())
            sidecars[name] = _write_shard(settings, name, outcomes, len(chunk), progress, bad)
    shards = [sidecars[name] for name in names]
    context = {"bad": listing.bad, "skipped": listing.skipped, "notes": listing.notes}
    manifest = build_manifest(settings.plan(), listing.label_names, shards, context)
    _check_bad(settings, manifest["bad"], total)
    with open(settings.out / "qa.jsonl", "w") as file:
        file.writelines(json.dumps(line) + "\n" for shard in shards for line in shard["quality"])
    write_manifest(settings.out, manifest)
    return manifest


def _parser() -> argparse.ArgumentParser:
    defaults = {name: field.default for name, field in Settings.__dataclass_fields__.items()}
    parser = argparse.ArgumentParser(
        prog="mg3d prepare",
        description="Reads CT volumes and reports, checks them, and writes sharded training records with a manifest.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--source", required=True, choices=sorted(SOURCES), help="layout of the data set")
    parser.add_argument("--root", required=True, type=Path, help="folder of the data set")
    parser.add_argument("--split", required=True, help="split of the data set: train, valid")
    parser.add_argument("--out", required=True, type=Path, help="folder for the records; started again, it continues")
    parser.add_argument(
        "--size", nargs=3, type=int, metavar=("X", "Y", "Z"), default=defaults["size"], help="voxels of the grid, RAS+"
    )
    parser.add_argument(
        "--spacing", nargs=3, type=float, metavar=("X", "Y", "Z"), default=defaults["spacing"], help="mm per voxel"
    )
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)), help="worker processes")
    parser.add_argument("--max-bad-share", type=float, default=defaults["max_bad_share"], help="fail above this share")
    parser.add_argument("--shard-records", type=int, default=defaults["shard_records"], help="records per shard")
    parser.add_argument("--zstd-level", type=int, default=defaults["zstd_level"], help="0 stores uncompressed")
    return parser


def main(argv: list[str]) -> int:
    """The command. Prints the summary; `UserError` when nothing is left or too much is bad."""
    args = _parser().parse_args(argv)
    if min(args.size) < 1 or min(args.spacing) <= 0:
        raise UserError(f"--size {args.size} and --spacing {args.spacing} must be positive")
    if not 0 <= args.max_bad_share <= 1:
        raise UserError(f"--max-bad-share {args.max_bad_share} is not a share between 0 and 1")
    if args.shard_records < 1 or not 0 <= args.zstd_level <= 22:
        raise UserError("--shard-records must be at least 1 and --zstd-level 0..22")
    settings = Settings(**{**vars(args), "size": tuple(args.size), "spacing": tuple(args.spacing)})
    print(summary(prepare(settings)))
    return 0

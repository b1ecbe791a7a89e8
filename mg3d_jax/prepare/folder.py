"""Volumes and reports on disk -> checked, sharded training records with a manifest: `mg3d prepare`.

    sources -> leak checks -> ordered examples -> fixed shards -> (workers: volumes, reports, records) -> manifest, QA

An example is a volume with its report, not read yet; a shard is a file of records. A volume that cannot be used, or has no
report, is "bad": it is left out, counted, and listed with the reason. Each finished shard has a sidecar, a JSON file that
says what it holds (`prepare/shards.py`): started again, only the others are made, and those of which a bad volume may be
whole by now. `--shard i/n` splits the shards over machines, and whichever finishes last writes the manifest.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

from mg3d_jax.data.records import INDEX_NAME, MANIFEST_NAME, read_manifest
from mg3d_jax.errors import UserError
from mg3d_jax.files import write_json, write_lines
from mg3d_jax.prepare import leaks
from mg3d_jax.prepare.estimate import check_disk, estimate
from mg3d_jax.prepare.fetch import FETCH_FAILED
from mg3d_jax.prepare.folds import keep_fold
from mg3d_jax.prepare.growth import Work, drop_shards, plan_work, write_layout
from mg3d_jax.prepare.listing import Example, Listing, SourceOptions
from mg3d_jax.prepare.manifest import build_manifest
from mg3d_jax.prepare.qa_page import write_page
from mg3d_jax.prepare.quality import QUALITY_NAME
from mg3d_jax.prepare.recipe import migrated, open_folder
from mg3d_jax.prepare.selection import list_source
from mg3d_jax.prepare.settings import Settings
from mg3d_jax.prepare.shards import (
    Outcome,
    Recipe,
    confirm,
    input_digest,
    kept_outcomes,
    key_of,
    ordered,
    outcomes,
    read_sidecars,
    with_kept,
    write_shard,
)
from mg3d_jax.prepare.snapshots import kept_shard, take_snapshot
from mg3d_jax.progress import Progress

logger = logging.getLogger(__name__)

_SHOWN_BAD = 10  # bad volumes that an error names
_MOST_UNREACHED = 3  # volumes in a row, from the first, that a --fetch may fail to bring before it ends


def list_examples(settings: Settings) -> Listing:
    """The examples of the source that are to be prepared, after `exclude` and `reconstructions`. No volume is opened."""
    options = SourceOptions(
        root=settings.root,
        split=settings.split,
        reconstructions=settings.reconstructions,
        exclude=settings.exclude,
        streaming=settings.fetch is not None,
        array_spacing=settings.array_spacing,
        array_axes=settings.array_axes,
        slice_window=settings.slice_window,
        negatives=settings.negatives,
        filters=settings.filters,
        label_mapping=settings.label_mapping,
    )
    listing = list_source(settings.source, options)
    if settings.modality != "CT":
        listing.examples = [
            replace(e, metadata=replace(e.metadata, modality=settings.modality)) for e in listing.examples
        ]
        listing.notes.append("MR: the 0.5th and 99.5th percentile of each volume are -1000 and 1000; there are no HU")
    if settings.fold is not None:
        keep_fold(listing, settings.fold, seed=settings.fold_seed, file=settings.fold_file)
    return listing


def check_bad(settings: Settings, bad: list[dict[str, str]], total: int) -> None:
    """Raises `UserError` when all of the `total` volumes are bad or more than `max_bad_share` of them; `bad.json` then has
    the whole list, `[{"path", "reason"}, ...]`."""
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
        "repair them and run the same command again, or allow more with --max-bad-share"
    )


def _process(settings: Settings, work: Work, root: Path, bad: int, mask_classes: int) -> dict[str, dict[str, Any]]:
    """Prepares those shards of this process's share (`settings.shard`) that are missing or worth doing again.

    Args:
        work: what is to be done (`growth.plan_work`).
        root: folder of the data set.
        bad: how many volumes were found bad while listing, for the note beside the progress.
        mask_classes: of the masks, background included; 0 where there are no masks.

    Returns:
        The sidecars of all finished shards by name, those of other processes too.
    """
    out, chunks = settings.out, work.chunks
    sidecars = read_sidecars(out, list(chunks))
    index, count = settings.shard
    mine = list(chunks)[index::count]
    todo = [name for name in work.todo(sidecars) if name in mine]
    keep = {name: work.redo.get(name, set()) & _recorded(sidecars.get(name)) for name in todo}
    fresh = [example for name in todo for example in chunks[name] if key_of(example) not in keep[name]]
    recipe = _recipe(settings, mask_classes)
    if expected := estimate(fresh, recipe, settings.workers):
        logger.info("prepare: %s", expected)
        check_disk(expected, out)
    _make_way(out, work, todo, sidecars)
    total = sum(len(chunks[name]) for name in mine)
    bad_so_far = bad + sum(len(sidecar["bad"]) for name, sidecar in sidecars.items() if name not in todo)
    begun, unreached = time.time(), 0 if settings.fetch else None
    # One stream over all shards: the workers stay busy across their boundaries.
    results = outcomes(fresh, recipe, settings.workers)
    with Progress(
        "prepare", total=total, unit="volumes", initial=total - sum(len(chunks[n]) for n in todo)
    ) as progress:

        def show(outcome: Outcome) -> None:
            nonlocal bad_so_far, unreached
            bad_so_far += outcome.data is None
            if unreached is not None:  # no volume was fetched yet
                unreached = unreached + 1 if (outcome.reason or "").startswith(FETCH_FAILED) else None
                if unreached == _MOST_UNREACHED:
                    raise UserError(f"--fetch brings nothing: {outcome.reason}. The same command goes on once it does")
            progress.advance(1, note=f"{bad_so_far} bad" if bad_so_far else "")

        for name in todo:
            old = sidecars.get(name)
            path = kept_shard(out, old) if old and keep[name] else None
            kept = kept_outcomes(path, old, keep[name]) if path and old else {}
            merged = with_kept(chunks[name], kept, results)
            try:
                sidecars[name] = write_shard(out, name, merged, len(chunks[name]), show, begun, root)
            except (OSError, RuntimeError) as error:
                raise UserError(
                    f"{out / name}: cannot be written ({error}): make room or raise the limit; the "
                    "same command goes on from here"
                ) from error
    # Read again: other machines (--shard i/n) may have finished shards meanwhile, or not yet done theirs again.
    found = read_sidecars(out, list(chunks)) | sidecars
    return {
        name: sidecar
        for name, sidecar in found.items()
        if name in mine or name not in work.redo or _now_done(sidecar, chunks[name])
    }


def _recipe(settings: Settings, mask_classes: int) -> Recipe:
    checksum = settings.compare == "checksum"
    return Recipe(settings.grid, settings.window, settings.zstd_level, settings.fetch, mask_classes, checksum)


def _recorded(sidecar: dict[str, Any] | None) -> set[str]:
    """Keys of the volumes of a shard that became records."""
    return {f"{entry['patient']}\t{entry['name']}" for entry in (sidecar or {"entries": []})["entries"]}


def _now_done(sidecar: dict[str, Any], chunk: list[Example]) -> bool:
    return list(sidecar.get("examples", ())) == [key_of(example) for example in chunk]


def _make_way(out: Path, work: Work, todo: list[str], sidecars: dict[str, dict[str, Any]]) -> None:
    """Before any shard changes: the state that a finished folder had is kept where its records change, and no manifest
    describes shards that are gone, should this process be killed."""
    if not todo and not work.leaving and work.layout is None:
        return
    if work.alters and (out / MANIFEST_NAME).is_file():
        redone = [sidecars[name] for name in work.redo if name in sidecars]
        changing = [one["file"] for one in redone if kept_shard(out, one) == out / one["file"]]  # not damaged ones
        folder = take_snapshot(out, [*changing, *(f"{name}.array_record" for name in work.leaving)])
        logger.info("prepare: runs that were started on %s as it was resume with --config.data.train=%s", out, folder)
    write_layout(out, work)
    (out / MANIFEST_NAME).unlink(missing_ok=True)
    drop_shards(out, work.leaving)


def _finish(
    settings: Settings,
    listing: Listing,
    code: dict[str, Any],
    sidecars: list[dict[str, Any]],
    listed_leaks: list[leaks.Leak],
    total: int,
) -> dict[str, Any]:
    """Checks the whole, then writes index, quality and manifest; the manifest marks the folder as finished.

    The QA page comes after it: it only shows what the others hold.

    Args:
        code: the version of the code that began the preparation (`version.code`).
        sidecars: of every shard, in order.
        listed_leaks: those that were found, and allowed, before any volume was read.
        total: how many volumes were listed, bad ones included.
    """
    context = {
        "label_names": list(listing.label_names),
        "bad": listing.bad,
        "skipped": listing.skipped,
        "notes": listing.notes,
        "cleaned": listing.cleaned,
        "mask_names": list(listing.mask_names),
    }
    manifest = build_manifest(settings.plan(), code, sidecars, context)
    check_bad(settings, manifest["bad"], total)
    entries = [entry for sidecar in sidecars for entry in sidecar["entries"]]
    all_leaks = leaks.merged(listed_leaks, leaks.content_leaks(entries, list(settings.against)))
    manifest["allowed_leaks"] = leaks.check(all_leaks, settings.allow_leak)
    quality = [line for sidecar in sidecars for line in sidecar["quality"]]
    write_lines(settings.out / INDEX_NAME, entries)
    write_lines(settings.out / QUALITY_NAME, quality)
    (settings.out / "bad.json").unlink(missing_ok=True)
    write_json(settings.out / MANIFEST_NAME, manifest)
    write_page(settings.out, manifest, quality, settings.qa_samples)
    return manifest


def _nothing_listed(settings: Settings, listing: Listing) -> str:
    """The error for a split without a volume: the splits that there are, and the rules that left volumes out."""
    others = f"the other splits are {sorted(listing.other_splits)}" if listing.other_splits else "it has no other split"
    left_out = [f"{count} left out: {rule}" for rule, count in listing.skipped.items()]
    return "; ".join([f"{settings.root} lists nothing to prepare for split {settings.split!r}", others, *left_out])


def _listed(settings: Settings) -> tuple[Listing, int]:
    """(what is to be prepared, how many volumes were listed)."""
    settings.check()
    listing = list_examples(settings)
    total = len(listing.examples) + len(listing.bad)
    if not total:
        raise UserError(_nothing_listed(settings, listing))
    return listing, total


def _listed_leaks(settings: Settings, listing: Listing) -> list[leaks.Leak]:
    """Leaks that can be seen before any volume is prepared."""
    against = list(settings.against)
    plan = settings.plan()
    leaks.check_comparable(against, {key: plan[key] for key in ("size", "spacing", "policy", "fraction", "window")})
    patients = leaks.listed_leaks(listing) + leaks.patient_leaks(listing.examples, against)
    return patients if settings.fetch else patients + leaks.file_leaks(listing.examples, against)


def dry_run(settings: Settings) -> str:
    """What `prepare` would do and why, in lines. Writes nothing."""
    listing, total = _listed(settings)
    found = _listed_leaks(settings, listing)
    root = settings.root if settings.root.is_dir() else settings.root.parent
    work = plan_work(settings.out, listing.examples, settings.shard_records, root, settings.compare)
    sidecars = read_sidecars(settings.out, list(work.chunks))
    todo = work.todo(sidecars)
    keep = {name: work.redo.get(name, set()) & _recorded(sidecars.get(name)) for name in todo}
    fresh = sum(len(work.chunks[name]) - len(keep[name]) for name in todo)
    lines = [
        f"{total} volumes listed, {len(listing.bad)} of them bad already",
        *(f"  {item['path']}: {item['reason']}" for item in listing.bad[:_SHOWN_BAD]),
        *work.said,
        f"would read {fresh} volumes, write {len(todo)} of {len(work.chunks)} shards, and drop {len(work.leaving)}",
        *(f"would stop: {leak}" for leak in found if leak.name not in settings.allow_leak),
    ]
    return "\n".join(lines)


def prepare(settings: Settings) -> dict[str, Any] | None:
    """Prepares a whole data set. Called again after an interruption it goes on where it was.

    Returns:
        The manifest; None where `settings.shard` left shards that other processes have not finished.

    Raises:
        UserError: the source lacks a table or holds nothing, too large a share is bad, patients or volumes leak between
            splits, or `settings.out` holds a preparation with other settings or of another recipe.
    """
    listing, total = _listed(settings)
    # What is bad already; volumes that cannot be read are known after processing, and `_finish` checks again.
    check_bad(settings, listing.bad, total)
    listed_leaks = _listed_leaks(settings, listing)
    leaks.check(listed_leaks, settings.allow_leak)  # raises for one that is not allowed
    root = settings.root if settings.root.is_dir() else settings.root.parent  # `root` may be a table: its folder
    work = plan_work(settings.out, listing.examples, settings.shard_records, root, settings.compare)
    plan = open_folder(settings.out, settings.plan() | {"input": input_digest(ordered(listing.examples), root)})
    if plan is None:  # finished with another version of the recipe: it stays as it is
        return migrated(read_manifest(settings.out))
    for line in work.said:
        logger.info("prepare: %s", line)
    confirm(settings.out, work.read)
    sidecars = _process(settings, work, root, len(listing.bad), len(listing.mask_names))
    if len(sidecars) < len(work.chunks):
        return None
    if (settings.out / MANIFEST_NAME).is_file():
        logger.info("prepare: %s was prepared already", settings.out)
    return _finish(settings, listing, plan["code"], [sidecars[name] for name in work.chunks], listed_leaks, total)


def summary(manifest: dict[str, Any]) -> str:
    """The lines that `mg3d prepare` prints at the end. MB are 10^6 bytes."""
    size, shards = sum(shard["bytes"] for shard in manifest["shards"]) / 1e6, len(manifest["shards"])
    spacing = f"{manifest['spacing']} mm" if manifest["spacing"] else "a spacing that varies"
    lines = [
        f"{manifest['records']} records of {len(manifest['patients'])} patients, {manifest['unique_reports']} distinct "
        f"reports, grid {manifest['grid']} at {spacing}, {size:.1f} MB in {shards} shards",
        *manifest["notes"],
        *(f"{count} texts cleaned of {kind}" for kind, count in manifest.get("cleaned", {}).items()),
        *(f"{count} left out: {rule}" for rule, count in manifest["skipped"].items()),
        *(
            f"leak allowed: {leak['name']} ({leak['where']}): {len(leak['items'])}"
            for leak in manifest["allowed_leaks"]
        ),
    ]
    if manifest["warnings"]:
        lines.append(f"{manifest['warnings']} volumes with a warning, see {QUALITY_NAME}")
    if bad := manifest["bad"]:
        lines.append(f"{len(bad)} bad, listed in manifest.json:")
        reasons = Counter(item["reason"].split(":")[0] for item in bad)
        lines += [f"  {count} x {reason}" for reason, count in reasons.most_common()]
    return "\n".join(lines)

"""What a prepared folder says about itself: `manifest.json`, written last: it is there only when all is done."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import mg3d_jax
from mg3d_jax.data.records import FORMAT_VERSION, MANIFEST_NAME
from mg3d_jax.files import write_json

# The modules that decide which bytes a record holds.
_CODE = (
    "prepare/geometry",
    "prepare/hounsfield",
    "prepare/listing",
    "prepare/nifti",
    "prepare/reading",
    "prepare/reports",
    "prepare/resample",
    "prepare/sources",
    "prepare/volumes",
    "data/records",
)


def code_version() -> str:
    """Version of the package and a digest of the code that decides the records' bytes."""
    digest = hashlib.sha256()
    for name in _CODE:
        digest.update((Path(__file__).parents[1] / f"{name}.py").read_bytes())
    return f"{mg3d_jax.__version__}+data.{digest.hexdigest()[:12]}"


def group_patients(patients: list[str]) -> list[list]:
    """[[patient, number of records], ...] of patients in record order."""
    groups: list[list] = []
    for patient in patients:
        if groups and groups[-1][0] == patient:
            groups[-1][1] += 1
        else:
            groups.append([patient, 1])
    return groups


def build_manifest(
    plan: dict[str, Any],
    shards: list[dict[str, Any]],
    listing: dict[str, Any],
) -> dict[str, Any]:
    """The manifest of a finished folder.

    plan: settings that decide the records (source, split, grid, ...). shards: the sidecar of every shard, in order.
    listing: {"label_names", "bad", "skipped", "notes"} of the source."""
    entries = [entry for shard in shards for entry in shard["entries"]]
    shard_keys = ("file", "records", "bytes", "sha256")
    return {
        "format_version": FORMAT_VERSION,
        "source": plan["source"],
        "split": plan["split"],
        "grid": plan["size"],
        "spacing": plan["spacing"],
        "label_names": listing["label_names"],
        "records": len(entries),
        "patients": group_patients([entry["patient"] for entry in entries]),
        "unique_reports": len({entry["report_id"] for entry in entries}),
        "shards": [{key: shard[key] for key in shard_keys} for shard in shards if shard["records"]],
        "bad": listing["bad"] + [item for shard in shards for item in shard["bad"]],
        "skipped": listing["skipped"],
        "notes": listing["notes"],
        "warnings": sum(bool(line["warnings"]) for shard in shards for line in shard["quality"]),
        "code_version": plan["code_version"],
        "settings": plan,
    }


def write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    """Writes `manifest.json`, which makes the folder complete."""
    write_json(folder / MANIFEST_NAME, manifest)

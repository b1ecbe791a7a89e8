"""What a prepared folder says about itself: `manifest.json`, written last: it is there only when all is done."""

from __future__ import annotations

from typing import Any

from mg3d_jax.data.records import FORMAT_VERSION
from mg3d_jax.prepare.recipe import RECIPE_VERSION


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
    plan: dict[str, Any], code: dict[str, Any], shards: list[dict[str, Any]], listing: dict[str, Any]
) -> dict[str, Any]:
    """The manifest of a finished folder. It follows from the arguments alone, which all processes of a preparation share:
    whichever finishes last writes the same bytes.

    Args:
        plan: the settings that decide the records: source, split, grid, ...
        code: what version of the code began the preparation, for people; as `mg3d_jax.version.code` gave it.
        shards: the sidecar of every shard, in order.
        listing: {"label_names", "bad", "skipped", "notes", "cleaned", "mask_names"} of the source.
    """
    entries = [entry for shard in shards for entry in shard["entries"]]
    shard_keys = ("file", "records", "bytes", "sha256")
    return {
        "format_version": FORMAT_VERSION,
        "source": plan["source"],
        "split": plan["split"],
        "grid": plan["size"],
        "spacing": plan["spacing"],
        "label_names": listing["label_names"],
        **({"mask_names": listing["mask_names"]} if listing["mask_names"] else {}),
        "records": len(entries),
        "patients": group_patients([entry["patient"] for entry in entries]),
        "unique_reports": len({entry["report_id"] for entry in entries}),
        "shards": [{key: shard[key] for key in shard_keys} for shard in shards if shard["records"]],
        "bad": listing["bad"] + [item for shard in shards for item in shard["bad"]],
        "skipped": listing["skipped"],
        "notes": listing["notes"],
        "cleaned": listing["cleaned"],
        "warnings": sum(bool(line["warnings"]) for shard in shards for line in shard["quality"]),
        "recipe_version": RECIPE_VERSION,
        "code": code,
        "settings": plan,
    }

"""Is a prepared folder what its manifest says? `mg3d prepare --verify`."""

from __future__ import annotations

from pathlib import Path

from mg3d_jax.data.records import RecordReader, file_digest
from mg3d_jax.errors import UserError
from mg3d_jax.prepare.manifest import group_patients
from mg3d_jax.progress import track


def verify(folder: Path) -> list[str]:
    """Every fault found, in words; empty for a sound folder. Reads everything: sizes, checksums, every record.

    A shard whose checksum is wrong is read record by record, and the damaged ones are named as training names them."""
    reader = RecordReader(folder)
    manifest, faults, readable = reader.manifest, [], []
    for shard in manifest["shards"]:
        path = Path(folder) / shard["file"]
        size = path.stat().st_size if path.is_file() else None
        readable += [size == shard["bytes"]] * shard["records"]
        if size is None:
            faults.append(f"{path} is missing")
        elif size != shard["bytes"]:
            faults.append(f"{path} has {size} bytes, the manifest says {shard['bytes']}")
        elif file_digest(path) != shard["sha256"]:
            faults.append(f"{path}: its sha256 is not the manifest's")
    patients, reports = [], set()
    for index in track([i for i, ok in enumerate(readable) if ok], "verify", sum(readable), unit="records"):
        try:
            record = reader[index]
        except UserError as error:
            faults.append(str(error))
            continue
        patients.append(record.patient)
        reports.add(record.report_id)
        if list(record.volume.shape) != manifest["grid"]:
            faults.append(f"record {index} ({record.name}) is {record.volume.shape}, the grid is {manifest['grid']}")
        if record.mask is not None and record.mask.max(initial=-1) >= len(manifest.get("mask_names", ())):
            faults.append(f"record {index} ({record.name}) has a mask of classes that the manifest does not name")
        if len(record.labels) != len(manifest["label_names"]):
            faults.append(f"record {index} ({record.name}) has {len(record.labels)} labels")
    if not faults:
        expected = {"records": len(patients), "unique_reports": len(reports), "patients": group_patients(patients)}
        faults += [
            f"manifest.json: {key} is not what the records hold" for key in expected if manifest[key] != expected[key]
        ]
    return faults

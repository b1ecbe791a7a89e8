"""Rad-ChestCT, Merlin, INSPECT and archives: phantoms of chests in the layouts of these data sets."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Iterator

import numpy as np

from mg3d_jax.data.abnormalities import ABNORMALITIES
from mg3d_jax.data.rad_chestct import MAPPINGS
from mg3d_jax.phantom import patients as phantoms
from mg3d_jax.phantom.dataset import nifti_bytes
from mg3d_jax.phantom.layouts.base import Files, Layout, csv_bytes
from mg3d_jax.phantom.miniature import Chest, stream

_HELD_OUT = {8: "valid", 9: "test"}  # of every ten


def _cases(layout: str, patients: int, seed: int) -> Iterator[tuple[int, str, phantoms.PhantomScan, np.ndarray, Chest]]:
    """(number, split, scan of a phantom patient, HU, where it lies)."""
    for number in range(patients):
        rng = stream(layout, seed, number)
        made = phantoms.make_patient(seed, number, "train", "plain").scans[0]
        spacing = (5.0, 5.0, 5.0) if layout == "rad-chestct" else (7.0, 7.0, 8.0)
        chest = Chest(rng, made.anatomy, made.findings, spacing)
        yield number, _HELD_OUT.get(number % 10, "train"), made, chest.hounsfield(rng), chest


def rad_chestct(patients: int, seed: int) -> Files:
    """Arrays that are said to be of 0.8 mm, as all of the data set are: these are a fifth of a chest's size."""
    abnormalities = sorted({name for mapping in MAPPINGS.values() for names in mapping.values() for name in names})
    rows: dict[str, list[dict[str, str]]] = {"train": [], "valid": [], "test": []}
    for number, split, made, hu, _ in _cases("rad-chestct", patients, seed):
        name = f"{split[:3]}{number:05d}"
        content = io.BytesIO()
        # Index axes z, y, x towards inferior, posterior, left.
        np.savez_compressed(content, ct=np.clip(hu, -1000, 1000)[::-1, ::-1, ::-1].transpose(2, 1, 0))
        yield f"npz/{name}.npz", content.getvalue()
        present = {label for label, value in zip(ABNORMALITIES, made.labels, strict=True) if value}
        here = {name for label in present for name in MAPPINGS["hlip"].get(label, ())}
        rows[split].append({"NoteAcc_DEID": name} | {f"{a}*lung": str(int(a in here)) for a in abnormalities})
    for split, found in rows.items():
        if found:
            yield f"img{split}_Abnormality_and_Location_Labels.csv", csv_bytes(found)


def merlin(patients: int, seed: int) -> Files:
    """Whole reports in one column; every fifth has a numbered list instead of the heading of its impression."""
    rows = []
    for number, split, made, hu, chest in _cases("merlin", patients, seed):
        study = f"AC{number:06d}"
        yield f"merlin_data/{study}.nii.gz", nifti_bytes(hu, chest.affine)
        end = (
            f"1. {made.report.impression}\n2. Otherwise unchanged."
            if number % 5 == 4
            else f"IMPRESSION: {made.report.impression}"
        )
        text = f"FINDINGS: {made.report.findings}\n{end}"
        rows.append({"study id": study, "Split": {"valid": "val"}.get(split, split), "Findings": text})
    yield "reports_final.csv", csv_bytes(rows)


def inspect(patients: int, seed: int) -> Files:
    """Impressions only; three tables joined by their id."""
    tables: dict[str, list[dict[str, str]]] = {"study_mapping": [], "impressions": [], "splits": []}
    for number, split, made, hu, chest in _cases("inspect", patients, seed):
        name, key = f"PE{number:05d}", f"{1000 + number}"
        yield f"full/CTPA/{name}.nii.gz", nifti_bytes(hu, chest.affine)
        given = made.report.impression not in ("", "Not given.")
        text = made.report.impression if given else made.report.findings
        tables["study_mapping"].append({"impression_id": key, "image_id": name, "person_id": str(number)})
        tables["impressions"].append({"impression_id": key, "impressions": text})
        tables["splits"].append({"impression_id": key, "split": split})
    for stem, rows in tables.items():
        lines = ["\t".join(rows[0]), *("\t".join(row.values()) for row in rows)]
        yield f"full/{stem}_20250611.tsv", ("\n".join(lines) + "\n").encode()


def archives(patients: int, seed: int) -> Files:
    """A zip archive per study with its volume, and a table."""
    rows = []
    for number, split, made, hu, chest in _cases("zip", patients, seed):
        name, content = f"study{number:04d}", io.BytesIO()
        with zipfile.ZipFile(content, "w") as archive:
            member = zipfile.ZipInfo(f"{name}/volume.nii.gz", date_time=(2020, 1, 1, 0, 0, 0))
            archive.writestr(member, nifti_bytes(hu, chest.affine))
        yield f"{name}.zip", content.getvalue()
        report = {"findings": made.report.findings, "impression": made.report.impression}
        rows.append({"volume": f"{name}.zip", **report, "patient": str(number), "split": split})
    yield "studies.csv", csv_bytes(rows)


RAD_CHESTCT = Layout("Rad-ChestCT: arrays and a column per abnormality and place", rad_chestct, patients=20)
MERLIN = Layout("Merlin: volumes and whole reports in one column", merlin, patients=20)
ZIP = Layout("one zip archive per study, and a table", archives, patients=20)
INSPECT = Layout("INSPECT: volumes and impressions in three tables", inspect, patients=20)

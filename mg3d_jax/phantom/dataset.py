"""A data set of procedural chest CT with reports, in CT-RATE's layout: `mg3d phantom`.

Volumes are written through a temporary name and renamed, so a run that was killed goes on where it stopped.
`phantom.json` in OUT says what the folder holds; a folder that holds anything else is refused. Runs without JAX.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import multiprocessing
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import nibabel
import numpy as np

from mg3d_jax.data.abnormalities import ABNORMALITIES
from mg3d_jax.errors import UserError
from mg3d_jax.files import remove_partials, write_bytes
from mg3d_jax.phantom import patients as phantoms
from mg3d_jax.progress import track

MARKER = "phantom.json"
REPORT_COLUMNS = ("VolumeName", "ClinicalInformation_EN", "Technique_EN", "Findings_EN", "Impressions_EN")
_LONG_SPLIT = {"train": "train", "valid": "validation"}  # CT-RATE's two spellings


def volume_path(out: Path, name: str) -> Path:
    """`train_1_a_1` -> `OUT/dataset/train/train_1/train_1_a/train_1_a_1.nii.gz`."""
    split, patient, scan, _ = name.split("_")
    folder = out / "dataset" / split / f"{split}_{patient}" / f"{split}_{patient}_{scan}"
    return folder / f"{name}.nii.gz"


def nifti_bytes(voxels: np.ndarray, affine: np.ndarray) -> bytes:
    """A gzip-compressed NIfTI-1 file of the voxels as they are (int16 HU, or uint8 classes), slope 1, intercept 0; the same
    bytes every time."""
    image = nibabel.Nifti1Image(np.asfortranarray(voxels), affine)
    image.header.set_xyzt_units("mm")
    image.set_sform(affine, code=1)
    image.set_qform(affine, code=1)
    buffer = io.BytesIO()
    # CT compresses little better at higher levels, which take several times as long.
    with gzip.GzipFile(filename="", mode="wb", compresslevel=1, fileobj=buffer, mtime=0) as stream:
        stream.write(image.to_bytes())
    return buffer.getvalue()


def _write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_partials(path)
    write_bytes(path, content, durable=False)


Rows = dict[str, list[dict[str, str]]]
Task = tuple[Path, int, int, str, str]  # folder, seed, index, split, style


def write_patient(out: Path, seed: int, index: int, split: str, style: str) -> Rows:
    """Writes the volumes of one patient that are not there yet; returns its rows of the three csv files."""
    rows: Rows = {"reports": [], "metadata": [], "labels": []}
    for scan in phantoms.make_patient(seed, index, split, style).scans:
        for reconstruction in scan.reconstructions:
            path = volume_path(out, reconstruction.name)
            if not path.exists():
                _write(path, nifti_bytes(reconstruction.hu, reconstruction.affine))
            report = scan.report
            texts = (path.name, report.clinical, report.technique, report.findings, report.impression)
            rows["reports"].append(dict(zip(REPORT_COLUMNS, texts, strict=True)))
            rows["metadata"].append(reconstruction.metadata)
            labels = {name: str(label) for name, label in zip(ABNORMALITIES, scan.labels, strict=True)}
            rows["labels"].append({"VolumeName": path.name} | labels)
    return rows


def _write_task(task: Task) -> Rows:
    return write_patient(*task)


def _write_csv(path: Path, rows: list[dict[str, str]]) -> None:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    _write(path, text.getvalue().encode())


def _cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _run(tasks: Sequence[Task], workers: int) -> Iterator[Rows]:
    """Rows of every task, in order."""
    if workers == 1:
        yield from map(_write_task, tasks)
        return
    # spawn: the parent may hold threads (progress bar, JAX in a notebook) that do not survive a fork.
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        try:
            yield from pool.map(_write_task, tasks, chunksize=4)
        except BrokenProcessPool as error:
            raise UserError(
                f"a worker process was killed (out of memory?). The same command goes on from here; "
                f"fewer than {workers} --workers need less memory."
            ) from error


def _open_folder(out: Path, settings: dict[str, int]) -> bool:
    """Claims `out` for these settings; True if an earlier run has finished it."""
    marker = out / MARKER
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file. Name a folder to write to.")
    if not marker.exists():
        remove_partials(marker)
        if out.is_dir() and any(out.iterdir()):
            raise UserError(
                f"{out} is not empty and holds no {MARKER}: it is not a phantom data set. Name a new folder."
            )
        _write(marker, json.dumps(settings | {"complete": False}, indent=1).encode())
        return False
    try:
        found = json.loads(marker.read_text())
        complete = found.pop("complete")
    except (ValueError, KeyError, AttributeError) as error:
        raise UserError(f"{marker} is not readable ({error}). Name a new folder, or delete {out}.") from error
    if found != settings:
        raise UserError(
            f"{out} holds phantoms of {found}, asked for {settings}. Name a new folder, or delete this one. "
            f"(Generators: {', '.join(f'{style.generator} is --style {name}' for name, style in phantoms.STYLES.items())}.)"
        )
    return complete


def _csv_paths(out: Path, split: str) -> dict[str, Path]:
    dataset, long = out / "dataset", _LONG_SPLIT[split]
    return {
        "reports": dataset / "radiology_text_reports" / f"{long}_reports.csv",
        "metadata": dataset / "metadata" / f"{long}_metadata.csv",
        "labels": dataset / "multi_abnormality_labels" / f"{split}_predicted_labels.csv",
    }


def _is_whole(out: Path, splits: Sequence[str]) -> bool:
    """Whether every csv file, and every volume that one names, is still there."""
    for split in splits:
        paths = _csv_paths(out, split)
        if not all(path.exists() for path in paths.values()):
            return False
        with paths["labels"].open(newline="") as stream:
            names = [row["VolumeName"].removesuffix(".nii.gz") for row in csv.DictReader(stream)]
        if not all(volume_path(out, name).exists() for name in names):
            return False
    return True


def make(
    out: Path, patients: int, valid: int, seed: int, workers: int | None = None, style: str = phantoms.STYLE
) -> int:
    """Writes the data set; returns how many volumes it holds, or 0 if `out` was already complete.

    `style` is a name of `patients.STYLES`. Raises `UserError` if `out` holds something else.
    """
    if patients < 0 or valid < 0 or patients + valid == 0:
        raise UserError(f"--patients {patients} --valid {valid}: neither may be negative, and one must be positive.")
    if seed < 0:
        raise UserError(f"--seed {seed}: must be 0 or more.")
    if workers is not None and workers < 1:
        raise UserError(f"--workers {workers}: must be 1 or more.")
    if style not in phantoms.STYLES:
        raise UserError(f"--style {style}: must be one of {', '.join(phantoms.STYLES)}.")
    settings = {"patients": patients, "valid": valid, "seed": seed, "generator": phantoms.STYLES[style].generator}
    counts = {"train": patients, "valid": valid}
    if _open_folder(out, settings) and _is_whole(out, [split for split, count in counts.items() if count]):
        return 0
    workers = workers or _cores()
    volumes = 0
    tasks = [(out, seed, index, split, style) for split, count in counts.items() for index in range(count)]
    split_rows: dict[str, Rows] = {}
    results = track(_run(tasks, min(workers, len(tasks))), "phantom", len(tasks), unit="patients")
    for (*_, split, _), rows in zip(tasks, results, strict=True):
        merged = split_rows.setdefault(split, {name: [] for name in rows})
        for name, more in rows.items():
            merged[name] += more
        volumes += len(rows["labels"])
    for split, rows in split_rows.items():
        for name, path in _csv_paths(out, split).items():
            _write_csv(path, rows[name])
    _write(out / MARKER, json.dumps(settings | {"complete": True}, indent=1).encode())
    return volumes

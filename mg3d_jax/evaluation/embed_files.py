"""Embeds prepared data, or single scans, to a file of `embedding_files`: what `mg3d embed` does.

The work is done in parts that lie in `OUT.parts` until the file is whole. After a kill the same command goes on behind the
last whole part, and the file has the same bytes as without the kill: parts begin at the same batch every time.
"""

from __future__ import annotations

import json
import logging
import math
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mg3d_jax import config as config_lib
from mg3d_jax.data.abnormalities import ABNORMALITIES
from mg3d_jax.data.pipeline import PreparedData
from mg3d_jax.errors import UserError
from mg3d_jax.evaluation import embedding_files
from mg3d_jax.evaluation.base import Evaluation, Text
from mg3d_jax.evaluation.embed import Embedder, embedded_prompts, logit_scale, prompt_entries
from mg3d_jax.evaluation.embedding_files import Arrays
from mg3d_jax.evaluation.label_tables import bare
from mg3d_jax.evaluation.run_grid import run_grid
from mg3d_jax.files import read_json, write_json
from mg3d_jax.prepare.scans import read_scan
from mg3d_jax.progress import Progress
from mg3d_jax.training.restore import RestoredRun

logger = logging.getLogger(__name__)

PART_VOLUMES = 512  # of a part, rounded up to whole batches
PART_TEXTS = 4096
ABOUT = "parts.json"


@dataclass(frozen=True)
class Done:
    """What was embedded now, and what lay there already; seconds without start and compilation are not told apart."""

    volumes: int
    resumed: int
    texts: int
    seconds: float


class Parts:
    """Arrays on disk, part by part, each whole or not there.

    Args:
        folder: theirs alone.
        about: what they are parts of. Parts of something else are thrown away, which is said.
    """

    def __init__(self, folder: Path, about: Mapping[str, Any]):
        self.folder, about = folder, json.loads(json.dumps(about))
        if folder.exists() and (not (folder / ABOUT).exists() or read_json(folder / ABOUT) != about):
            logger.warning("%s: parts of another command, from another run or data, are thrown away", folder)
            shutil.rmtree(folder)
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / ABOUT, about)

    def path(self, name: str, number: int) -> Path:
        return self.folder / f"{name}-{number:06d}.npz"

    def whole(self, name: str) -> int:
        """How many parts there are from the first one on."""
        number = 0
        while self.path(name, number).exists():
            number += 1
        return number

    def write(self, name: str, number: int, arrays: Arrays) -> None:
        embedding_files.save_npz(self.path(name, number), arrays)

    def read(self, name: str) -> Arrays:
        """All parts one after the other."""
        found = [embedding_files.load(self.path(name, number)) for number in range(self.whole(name))]
        return {key: np.concatenate([part[key] for part in found]) for key in found[0]}

    def remove(self) -> None:
        shutil.rmtree(self.folder)


def embed_data(
    run: RestoredRun,
    folders: Sequence[str],
    out: Path,
    evaluation: Evaluation,
    *,
    sentences: bool = False,
    batch_size: int = 16,
    max_bad_records: int = 0,
) -> Done:
    """Volumes, distinct reports, prompts and labels of prepared folders to the file `out`, over all devices that are here.

    Args:
        evaluation: whose prompts are embedded.
        sentences: every sentence of the reports, too.
        max_bad_records: so many damaged records are skipped and named; more are an error.
    """
    embedding_files.check_format(out)
    data = PreparedData(tuple(folders), volume_size=run.config.model.volume_size)
    embedder = Embedder.of_run(run, batch_size)
    about = _about(run) | {"data": list(folders), "volumes": len(data), "batch_size": embedder.batch_size}
    parts = Parts(out.with_name(f"{out.name}.parts"), about | {"sentences": sentences})
    started = time.monotonic()
    resumed = _embed_volumes(run, embedder, data, parts, max_bad_records)
    volumes = parts.read("volumes")
    records = [data.text(index) for index in volumes["record_index"]]
    reports = {record.report_id: record.sentences for record in records}
    arrays: Arrays = {
        "volume_embeddings": volumes["embedding"],
        "labels": volumes["labels"],
        "label_names": np.array(data.label_names, str),
        "volume_ids": np.array([record.name for record in records], str),
        "scan_ids": np.array([record.scan for record in records], str),
        "patient_ids": np.array([record.patient for record in records], str),
        "volume_report_ids": np.array([record.report_id for record in records], str),
        "report_ids": np.array(list(reports), str),
        "report_texts": np.array(["\n".join(text) for text in reports.values()], str),
    }
    texts = [embedder.report_texts(text) for text in reports.values()]
    arrays["report_embeddings"] = _embed_texts(run, embedder, parts, "reports", texts)
    count = len(texts)
    if sentences:
        arrays |= _embed_sentences(run, embedder, parts, reports)
        count += len(arrays["sentence_texts"])
    arrays |= _prompts(run, embedder, evaluation, data.label_names)
    arrays |= _scalars(run, about)
    embedding_files.save(out, arrays)
    parts.remove()
    return Done(len(records) - resumed, resumed, count, time.monotonic() - started)


def embed_scans(
    run: RestoredRun,
    scans: Sequence[Path],
    out: Path,
    evaluation: Evaluation,
    *,
    spacing: tuple[float, float, float] | None = None,
    policy: str | None = None,
) -> Done:
    """Scans, each a NIfTI file or a folder with one DICOM series, to the file `out`; each is a patient of its own name."""
    embedding_files.check_format(out)
    names = [bare(scan.name) for scan in scans]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise UserError(f"--scan: {', '.join(twice)} would be the id of several scans: give them in separate files")
    embedder, grid, started = Embedder.of_run(run, 1), run_grid(run, spacing, policy), time.monotonic()
    found = []
    with Progress("embed", len(scans), unit="scans") as progress:
        for scan in scans:
            found.append(embedder.volume(run.params, read_scan(scan, grid).volume))
            progress.advance()
    arrays: Arrays = {
        "volume_embeddings": np.stack(found),
        "volume_ids": np.array(names, str),
        "patient_ids": np.array(names, str),
    }
    arrays |= _prompts(run, embedder, evaluation, ABNORMALITIES)
    embedding_files.save(out, arrays | _scalars(run, _about(run) | {"scans": [str(scan) for scan in scans]}))
    return Done(len(scans), 0, 0, time.monotonic() - started)


def _about(run: RestoredRun) -> dict[str, Any]:
    about = {"run": str(run.folder), "step": run.step, "config_hash": config_lib.config_hash(run.config)}
    return about | {"weights": "average" if run.ema else "raw"}


def _scalars(run: RestoredRun, about: Mapping[str, Any]) -> Arrays:
    return {"logit_scale": np.array(logit_scale(run.params)), "about": np.array(json.dumps(about), str)}


def _embed_volumes(run: RestoredRun, embedder: Embedder, data: PreparedData, parts: Parts, max_bad_records: int) -> int:
    """Writes the parts that are missing; returns how many records lay there."""
    batches = math.ceil(PART_VOLUMES / embedder.batch_size)
    number, resumed = parts.whole("volumes"), 0
    if number:
        resumed = len(parts.read("volumes")["record_index"])
        logger.warning("%s: %d of %d volumes are there already", parts.folder, resumed, len(data))
    waiting: list[Arrays] = []

    def flush() -> None:
        nonlocal number
        if waiting:
            parts.write("volumes", number, {key: np.concatenate([rows[key] for rows in waiting]) for key in waiting[0]})
            waiting.clear()
            number += 1

    with Progress("embed", len(data), unit="volumes", initial=resumed) as progress:
        for rows in embedder.volume_batches(run.params, data, start=number * batches, max_bad_records=max_bad_records):
            waiting.append(rows)
            if len(waiting) == batches:
                flush()
            progress.advance(len(rows["record_index"]))
        flush()
    return resumed


def _embed_texts(
    run: RestoredRun, embedder: Embedder, parts: Parts, name: str, entries: Sequence[Sequence[Text]]
) -> np.ndarray:
    """`[entries, k]`, part by part."""
    if not entries:
        return np.zeros((0, embedder.width), np.float32)
    done = parts.whole(name)
    with Progress(
        f"embed {name}", len(entries), unit="texts", initial=min(done * PART_TEXTS, len(entries))
    ) as progress:
        for number in range(done, math.ceil(len(entries) / PART_TEXTS)):
            part = entries[number * PART_TEXTS : (number + 1) * PART_TEXTS]
            parts.write(name, number, {"embedding": embedder.texts(run.params, embedder.tokenize(part))})
            progress.advance(len(part))
    return parts.read(name)["embedding"]


def _embed_sentences(run: RestoredRun, embedder: Embedder, parts: Parts, reports: Mapping[str, Text]) -> Arrays:
    """Every sentence of every report in order; each distinct one is embedded once."""
    texts = [(report, sentence) for report, of in reports.items() for sentence in of]
    distinct = {sentence: row for row, sentence in enumerate(dict.fromkeys(sentence for _, sentence in texts))}
    embeddings = _embed_texts(run, embedder, parts, "sentences", [[[sentence]] for sentence in distinct])
    return {
        "sentence_embeddings": embeddings[[distinct[sentence] for _, sentence in texts]],
        "sentence_report_ids": np.array([report for report, _ in texts], str),
        "sentence_texts": np.array([sentence for _, sentence in texts], str),
    }


def _prompts(run: RestoredRun, embedder: Embedder, evaluation: Evaluation, label_names: Sequence[str]) -> Arrays:
    sets = evaluation.prompts(label_names)
    if not (entries := prompt_entries(sets)):
        return {}
    rows = embedder.texts(run.params, embedder.tokenize(entries))
    return dict(embedding_files.prompt_arrays(embedded_prompts(sets, rows)))

"""What an export starts from: the weights of a run, and real inputs on which both frameworks must agree."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

from mg3d_jax.batch import AIR_HU
from mg3d_jax.config import Config
from mg3d_jax.data.tokens import ReportTokenizer, load_tokenizer
from mg3d_jax.errors import UserError
from mg3d_jax.interop.export_format import HEAD, REPORT_DECODER, SEGMENTATION_HEAD
from mg3d_jax.models.mg3d import text_embedding, volume_embedding
from mg3d_jax.objectives.pairwise import l2_normalize
from mg3d_jax.phantom import patients as phantoms
from mg3d_jax.phantom.dataset import nifti_bytes
from mg3d_jax.prepare.geometry import STRAIGHTEN_DEGREES, Grid
from mg3d_jax.prepare.reports import report_sentences
from mg3d_jax.prepare.scans import Spacing, trained_grid
from mg3d_jax.prepare.volumes import prepare_volume
from mg3d_jax.training import inputs as step_inputs
from mg3d_jax.training.restore import exact_model, restore_run
from mg3d_jax.training.run_folder import TOKENIZER_FOLDER

PHANTOM_SEED = 20_241_205


@dataclass(frozen=True)
class Run:
    """The weights of one checkpoint as float32 NumPy arrays, and what belongs to them."""

    config: Config
    params: dict[str, Any]
    tokenizer_folder: Path
    step: int
    grid: Grid  # that the volumes of its data were brought to
    sources: tuple[str, ...]  # layouts of the data sets that it was trained on, e.g. "ctrate"
    label_names: tuple[str, ...] = ()  # of its training data, as far as that is known
    modality: str = "CT"  # of the data; of MR the numbers are no HU
    mask_names: tuple[str, ...] = ()  # classes of its masks, background first, as far as that is known
    clip: tuple[float, float] | None = None  # HU, outside of which the records of its data hold nothing

    @property
    def spacing(self) -> Spacing:
        """mm per voxel."""
        return self.grid.spacing

    @property
    def model_grid(self) -> Grid:
        """`grid` of the size that the volume encoder takes."""
        x, y, z = self.config.model.volume_size
        return replace(self.grid, size=(x, y, z))

    @property
    def tokenizer(self) -> ReportTokenizer:
        """With the token limit that training used for a view of a report."""
        text = load_tokenizer(str(self.tokenizer_folder))
        return ReportTokenizer(text, self.config.text_tokens(), self.config.data.max_sentences)


def load_run(workdir: Path, step: int | None = None, spacing: Spacing | None = None, policy: str | None = None) -> Run:
    """The newest checkpoint of a run, or that of `step`.

    Raises `UserError` where there is none, and where nothing says how the volumes were brought to the grid.
    """
    run = restore_run(workdir, step)
    params = jax.tree.map(lambda x: np.asarray(x, np.float32), jax.device_get(run.params))
    settings = run.prepared("settings") or {}
    if mixed := {"window", "modality"} & set(settings.get("mixed", ())):
        raise UserError(
            f"{workdir}: the folders of its data differ in {sorted(mixed)}: no single preprocessing stands for them"
        )
    source = run.prepared("source")
    window = settings.get("window")
    return Run(
        run.config,
        params,
        workdir / TOKENIZER_FOLDER,
        run.step,
        trained_grid(run.config.grid, settings, spacing or run.prepared("spacing"), policy),
        tuple(source.split(" + ")) if source else (),
        tuple(run.prepared("label_names") or ()),
        settings.get("modality") or "CT",
        tuple(run.prepared("mask_names") or ()),
        (float(window[0]), float(window[1])) if window else None,
    )


@dataclass(frozen=True)
class Inputs:
    """int16 HU `[n, X, Y, Z]` on the model's grid and the sentences of the n reports."""

    volumes: np.ndarray
    reports: tuple[tuple[str, ...], ...]


@functools.lru_cache(maxsize=1)
def phantom_scans(count: int = 4) -> tuple[tuple[bytes, tuple[str, ...]], ...]:
    """Phantom chest CT as `.nii.gz` with the sentences of its report. No chest lies in the middle of its file, so that it
    shows which part of a scan is taken, and one scan is askew by more than a preparation leaves as it is."""
    found = []
    for index in range(count):
        scan = phantoms.make_patient(PHANTOM_SEED, index, "valid").scans[0]
        hu, affine = scan.reconstructions[0].hu, scan.reconstructions[0].affine.copy()
        hu = np.pad(
            hu, [(0, hu.shape[axis] // 4 if axis == index % 3 else 0) for axis in range(3)], constant_values=AIR_HU
        )
        if index == count - 1:
            turn = np.radians(STRAIGHTEN_DEGREES + 5)
            about_z = [[np.cos(turn), -np.sin(turn), 0], [np.sin(turn), np.cos(turn), 0], [0, 0, 1]]
            affine[:3, :3] = np.array(about_z) @ affine[:3, :3]
        found.append((nifti_bytes(hu, affine), tuple(report_sentences(scan.report.findings, scan.report.impression))))
    return tuple(found)


@functools.lru_cache(maxsize=1)
def phantom_inputs(grid: Grid, count: int = 4) -> Inputs:
    """`phantom_scans` through the same steps as `mg3d prepare`: NIfTI file, checks, RAS+, resampling, cropping."""
    scans = phantom_scans(count)
    with tempfile.TemporaryDirectory() as folder:
        path, volumes = Path(folder) / "scan.nii.gz", []
        for content, _ in scans:
            path.write_bytes(content)
            volumes.append(prepare_volume(path, grid).volume)
    return Inputs(np.stack(volumes), tuple(sentences for _, sentences in scans))


def reference_features(run: Run, volumes: np.ndarray, reports: Sequence[Sequence[str]]) -> dict[str, np.ndarray]:
    """Every feature of the Linen model in float32: embeddings `[n, k]` l2-normalised, `volume_tokens [n, N, d]`, ...; of a
    run with these heads also `classification_logits [n, L]`, `segmentation_logits [n, X, Y, Z, K]` and `next_token_logits
    [n, T - 1, V]`, of a decoder that reads findings with `findings [n, L]`, those that the head finds."""
    tokenizer = run.tokenizer
    model = exact_model(run.config, tokenizer.vocab_size)
    rows = [tokenizer(report) for report in reports]
    text = {name: np.stack([row[name] for row in rows]) for name in ("token_ids", "token_mask", "sentence_index")}

    def features(params: Any) -> dict[str, jax.Array]:
        windowed = step_inputs.window(volumes, run.config.data.windows)
        names = ("volume_tokens", "volume_pooled", "volume_embedding")
        volume = model.apply({"params": params}, {"volume": windowed}, names, method="compute")
        found = volume | model.apply({"params": params}, text, method="embed_report")
        if HEAD in params:
            head = params[HEAD]
            found["classification_logits"] = found["volume_pooled"] @ head["kernel"] + head["bias"]
        if SEGMENTATION_HEAD in params:
            (voxels,), head = (
                model.apply({"params": params}, windowed[:, None], False, method="segment"),
                SEGMENTATION_HEAD,
            )
            found["segmentation_logits"] = voxels[:, 0] @ params[head]["kernel"] + params[head]["bias"]
        if REPORT_DECODER in params:  # of the first reports, as many as volumes
            rows, length = len(windowed), run.config.data.max_tokens
            given = {"volume": windowed, "report": {name: array[:rows, :length] for name, array in text.items()}}
            logits = "next_token_logits"
            if run.config.tasks["generation"].findings:
                given["findings"] = found["findings"] = (found["classification_logits"] > 0).astype(np.int8)
                logits = "next_token_logits_of_findings"
            (found["next_token_logits"],) = model.apply({"params": params}, given, (logits,), method="compute").values()
        return found

    with jax.default_matmul_precision("highest"):
        found = jax.device_get(jax.jit(features)(run.params))
    found["volume_embedding"] = np.asarray(volume_embedding(run.params, found["volume_embedding"]))
    found["report_embedding"] = np.asarray(text_embedding(run.params, l2_normalize(found["report_embedding"])))
    return found

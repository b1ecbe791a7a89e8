"""What an export starts from: the weights of a run, and real inputs on which both frameworks must agree."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from mg3d_jax.config import Config
from mg3d_jax.data.tokens import ReportTokenizer, load_tokenizer
from mg3d_jax.errors import UserError
from mg3d_jax.interop.export_format import REPORT_DECODER, SEGMENTATION_HEAD
from mg3d_jax.models.mg3d import text_embedding, volume_embedding
from mg3d_jax.objectives.pairwise import l2_normalize
from mg3d_jax.phantom import patients as phantoms
from mg3d_jax.phantom.dataset import nifti_bytes
from mg3d_jax.prepare.reports import report_sentences
from mg3d_jax.prepare.volumes import Grid, prepare_volume
from mg3d_jax.training import inputs as step_inputs
from mg3d_jax.training.restore import exact_model, restore_run
from mg3d_jax.training.run_folder import TOKENIZER_FOLDER

PHANTOM_SEED = 20_241_205
Spacing = tuple[float, float, float]


@dataclass(frozen=True)
class Run:
    """The weights of one checkpoint as float32 NumPy arrays, and what belongs to them. `spacing` is in mm."""

    config: Config
    params: dict[str, Any]
    tokenizer_folder: Path
    step: int
    spacing: Spacing
    sources: tuple[str, ...]  # layouts of the data sets that it was trained on, e.g. "ctrate"
    label_names: tuple[str, ...] = ()  # of its training data, as far as that is known
    modality: str = "CT"  # of the data; of MR the numbers are no HU
    mask_names: tuple[str, ...] = ()  # classes of its masks, background first, as far as that is known

    @property
    def tokenizer(self) -> ReportTokenizer:
        """With the token limit that training used for a view of a report."""
        text = load_tokenizer(str(self.tokenizer_folder))
        return ReportTokenizer(text, self.config.text_tokens(), self.config.data.max_sentences)


def load_run(workdir: Path, step: int | None = None, spacing: Spacing | None = None) -> Run:
    """The newest checkpoint of a run, or that of `step`.

    Raises `UserError` where there is none, and where nothing says which spacing the volumes had.
    """
    run = restore_run(workdir, step)
    params = jax.tree.map(lambda x: np.asarray(x, np.float32), jax.device_get(run.params))
    spacing = spacing or run.prepared("spacing")
    if spacing is None:
        raise UserError(
            f"neither the checkpoint nor a manifest in data.train = {tuple(run.config.data.train)} says which spacing "
            "the volumes have: give --spacing X Y Z in mm"
        )
    source = run.prepared("source")
    sources = (source,) if source else ()
    names = tuple(run.prepared("label_names") or ())
    modality = str((run.prepared("settings") or {}).get("modality", "CT"))
    return Run(
        run.config, params, workdir / TOKENIZER_FOLDER, run.step, tuple(spacing), sources, names, modality,
        tuple(run.prepared("mask_names") or ()),
    )  # fmt: skip


@dataclass(frozen=True)
class Inputs:
    """int16 HU `[n, X, Y, Z]` on the model's grid and the sentences of the n reports."""

    volumes: np.ndarray
    reports: tuple[tuple[str, ...], ...]


@functools.lru_cache(maxsize=1)
def phantom_inputs(size: tuple[int, int, int], spacing: Spacing, count: int = 4) -> Inputs:
    """Phantom chest CT through the same steps as `mg3d prepare`: NIfTI file, checks, RAS+, resampling, cropping."""
    volumes, reports = [], []
    with tempfile.TemporaryDirectory() as folder:
        for index in range(count):
            scan = phantoms.make_patient(PHANTOM_SEED, index, "valid").scans[0]
            path = Path(folder) / f"{index}.nii.gz"
            path.write_bytes(nifti_bytes(scan.reconstructions[0].hu, scan.reconstructions[0].affine))
            volumes.append(prepare_volume(path, Grid(size, spacing)).volume)
            reports.append(report_sentences(scan.report.findings, scan.report.impression))
    return Inputs(np.stack(volumes), tuple(reports))


def reference_features(run: Run, volumes: np.ndarray, reports: Sequence[Sequence[str]]) -> dict[str, np.ndarray]:
    """Every feature of the Linen model in float32: embeddings `[n, k]` l2-normalised, `volume_tokens [n, N, d]`, ...; of a
    run with these decoders also `segmentation_logits [n, X, Y, Z, K]` and `next_token_logits [n, T - 1, V]`."""
    tokenizer = run.tokenizer
    model = exact_model(run.config, tokenizer.vocab_size)
    rows = [tokenizer(report) for report in reports]
    text = {name: np.stack([row[name] for row in rows]) for name in ("token_ids", "token_mask", "sentence_index")}

    def features(params: Any) -> dict[str, jax.Array]:
        windowed = step_inputs.window(volumes, run.config.data.windows)
        names = ("volume_tokens", "volume_pooled", "volume_embedding")
        volume = model.apply({"params": params}, {"volume": windowed}, names, method="compute")
        found = volume | model.apply({"params": params}, text, method="embed_report")
        if SEGMENTATION_HEAD in params:
            (voxels,), head = (
                model.apply({"params": params}, windowed[:, None], False, method="segment"),
                SEGMENTATION_HEAD,
            )
            found["segmentation_logits"] = voxels[:, 0] @ params[head]["kernel"] + params[head]["bias"]
        if REPORT_DECODER in params:  # of the first reports, as many as volumes
            rows, length = len(windowed), run.config.data.max_tokens
            given = {"volume": windowed, "report": {name: array[:rows, :length] for name, array in text.items()}}
            found |= model.apply({"params": params}, given, ("next_token_logits",), method="compute")
        return found

    with jax.default_matmul_precision("highest"):
        found = jax.device_get(jax.jit(features)(run.params))
    found["volume_embedding"] = np.asarray(volume_embedding(run.params, found["volume_embedding"]))
    found["report_embedding"] = np.asarray(text_embedding(run.params, l2_normalize(found["report_embedding"])))
    return found

"""The registered evaluations of a trained run, as one document and one picture."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mg3d_jax.data.pipeline import PreparedData
from mg3d_jax.data.tokens import ReportTokenizer
from mg3d_jax.evaluation.base import chosen, sections
from mg3d_jax.evaluation.embed import DataEmbedder, Embedder
from mg3d_jax.progress import Progress
from mg3d_jax.training.restore import RestoredRun


def evaluate(
    run: RestoredRun,
    data_folders: Sequence[str],
    *,
    only: Iterable[str] | None = None,
    options: Mapping[str, Any] | None = None,
    batch_size: int = 16,
) -> dict[str, Any]:
    """Embeds the data once and gives it to all evaluations, or to those of the names `only`. Every number's protocol is in
    the result.

    Args:
        options: of the evaluations, by name; without it those of the run's configuration.
    """
    config = run.config
    evaluations = chosen(only, config.evaluations if options is None else options)
    data = PreparedData(tuple(data_folders), volume_size=config.model.volume_size)
    tokenizer = ReportTokenizer(run.tokenizer, config.data.max_tokens, config.data.max_sentences)
    with Progress("embed", len(data), unit="volumes") as progress:
        found = DataEmbedder(Embedder(run.setup, tokenizer, batch_size), data, evaluations)(run.params, progress)
    patients = next(iter(found.values())).patients  # shared; empty where no evaluation needs embeddings
    return {
        "run": str(run.folder),
        "step": run.step,
        "weights": "average" if run.ema else "raw",
        "data": list(data_folders),
        "volumes": len(data),
        "patients": len(np.unique(patients)) if len(patients) else data.patients,
    } | {name: one.full(found[name]) for name, one in evaluations.items()}


def plot(document: Mapping[str, Any], path: Path) -> bool:
    """Draws a panel for each evaluation that has one into a PNG; False where none has."""
    from matplotlib.figure import Figure

    shown = [one.plot for one in sections(document) if one.plot is not None]
    if not shown:
        return False
    figure = Figure(figsize=(6 * len(shown), 6), layout="constrained")
    for axes, draw in zip(figure.subplots(1, len(shown), squeeze=False)[0], shown, strict=True):
        draw(axes)
    about = f"{document['volumes']} volumes of {document['patients']} patients"
    figure.suptitle(f"{document['run']}, step {document['step']}, {about}")
    figure.savefig(path, dpi=110)
    return True

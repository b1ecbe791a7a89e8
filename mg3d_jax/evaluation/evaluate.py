"""The registered evaluations of a trained run on prepared data."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from mg3d_jax.data.pipeline import PreparedData
from mg3d_jax.errors import UserError
from mg3d_jax.evaluation import document
from mg3d_jax.evaluation.document import Evaluated
from mg3d_jax.evaluation.embed import DataEmbedder, Embedder
from mg3d_jax.objectives.base import enabled, reads_masks
from mg3d_jax.progress import Progress
from mg3d_jax.training.restore import RestoredRun


def evaluate(
    run: RestoredRun,
    data_folders: Sequence[str],
    *,
    only: Iterable[str] | None = None,
    overrides: Mapping[str, str] | None = None,
    train_folders: Sequence[str] = (),
    train_patients: Mapping[str, Any] | None = None,
    batch_size: int = 16,
) -> Evaluated:
    """Embeds the data once and gives it to all evaluations, or to those of the names `only`. Every number's protocol is in
    the result.

    Args:
        overrides: options of the evaluations as text, by `NAME.KEY`; the others are those of the run's configuration.
        train_folders: labelled volumes of other patients, for the evaluations that need some.
        train_patients: which patients of these folders, as `DataConfig.subset` has it; None: all.
    """
    config = run.config
    evaluations = document.configured(only, config.evaluations, overrides)
    masks = reads_masks(enabled(config.objectives, config.tasks))
    data = PreparedData(tuple(data_folders), volume_size=config.grid, masks=masks)
    train, total = None, len(data)
    needs = {need for one in evaluations.values() for need in one.needs}
    if train_folders and needs & {"train", "model"}:
        size = config.grid
        train = PreparedData(tuple(train_folders), volume_size=size, **(train_patients or {}))
        total += len(train) if "train" in needs else 0
    embed = DataEmbedder(Embedder.of_run(run, batch_size), data, evaluations, train=train)
    with Progress("embed", total, unit="volumes") as progress:
        found = embed(run.params, progress)
    lacking = {name: words for name, one in evaluations.items() if (words := one.lacks(found[name]))}
    if wanted := lacking.keys() & set(only or ()):
        raise UserError("; ".join(f"the evaluation {name!r} {lacking[name]}" for name in sorted(wanted)))
    patients = next(iter(found.values())).patients  # shared; empty where no evaluation needs embeddings
    about = {
        "run": str(run.folder),
        "step": run.step,
        "weights": "average" if run.ema else "raw",
        "data": list(data_folders),
        "volumes": len(data),
        "patients": len(np.unique(patients)) if len(patients) else data.patients,
        "left_out": lacking,
    }
    if train is not None:
        about["train_data"] = list(train_folders)

    def volume(row: int) -> tuple[np.ndarray, np.ndarray]:
        record = data.read(row)
        return record.volume, np.linalg.norm(record.affine[:3, :3], axis=0)

    return document.measure(
        found, {name: one for name, one in evaluations.items() if name not in lacking}, about, volume
    )

"""The registered evaluations on held-out data while a run trains: the numbers of `mg3d evaluate`, without intervals."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mg3d_jax.data.pipeline import PreparedData
from mg3d_jax.data.tokens import ReportTokenizer
from mg3d_jax.evaluation.base import NEVER, Evaluation, chosen, merge_metrics
from mg3d_jax.evaluation.embed import DataEmbedder, Embedder
from mg3d_jax.training.state import Setup


class OnlineEvaluation:
    """Scores parameters on `data`, in batches of `data.batch_size`, on the run's own mesh.

    Compiles once, reads every volume once per call, tokenises texts once. All processes must call it. Damaged records are
    left out as in training: named, in `log_folder` too, and at most `data.max_bad_records` of them. Evaluations whose
    `every` is -1 are left out.
    """

    def __init__(self, setup: Setup, tokenizer: ReportTokenizer, data: PreparedData, *, log_folder: Path | None = None):
        config = setup.config
        bad_records = {"log_folder": log_folder, "max_bad_records": config.data.max_bad_records}
        embedder = Embedder(setup, tokenizer, config.data.batch_size)
        evaluations = chosen(options=config.evaluations)
        kept = {name: one for name, one in evaluations.items() if one.settings.every != NEVER}
        train = None
        if config.data.train and any("train" in one.needs for one in kept.values()):
            train = PreparedData(config.data.train, **config.data.subset())
        self._embed = DataEmbedder(embedder, data, kept, train=train, **bad_records)

    @property
    def evaluations(self) -> dict[str, Evaluation]:
        """Those that are measured."""
        return dict(self._embed.evaluations)

    def metrics(self, params: Any, only: Sequence[str] | None = None) -> dict[str, float]:
        """The `metrics` of every evaluation, or of those named `only`; their own documentation says what they mean."""
        found = self._embed(params, only=only)
        return merge_metrics({name: self._embed.evaluations[name].metrics(one) for name, one in found.items()})

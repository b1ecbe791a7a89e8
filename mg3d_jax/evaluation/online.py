"""The registered evaluations on held-out data while a run trains: the numbers of `mg3d evaluate`, without intervals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mg3d_jax.data.pipeline import PreparedData
from mg3d_jax.data.tokens import ReportTokenizer
from mg3d_jax.evaluation.base import chosen, merge_metrics
from mg3d_jax.evaluation.embed import DataEmbedder, Embedder
from mg3d_jax.training.state import Setup


class OnlineEvaluation:
    """Scores parameters on `data`, in batches of `data.batch_size`, on the run's own mesh.

    Compiles once, reads every volume once per call, tokenises texts once. All processes must call it. Damaged records are
    left out as in training: named, in `log_folder` too, and at most `data.max_bad_records` of them.
    """

    def __init__(self, setup: Setup, tokenizer: ReportTokenizer, data: PreparedData, *, log_folder: Path | None = None):
        options = setup.config.data
        bad_records = {"log_folder": log_folder, "max_bad_records": options.max_bad_records}
        embedder = Embedder(setup, tokenizer, options.batch_size)
        self._embed = DataEmbedder(embedder, data, chosen(), **bad_records)

    def metrics(self, params: Any) -> dict[str, float]:
        """The `metrics` of every evaluation; their own documentation says what they mean."""
        found = self._embed(params)
        return merge_metrics({name: one.metrics(found[name]) for name, one in self._embed.evaluations.items()})

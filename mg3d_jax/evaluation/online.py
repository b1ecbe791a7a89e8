"""Zero-shot AUROC and retrieval of held-out data while a run trains: what `mg3d evaluate` computes, without intervals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mg3d_jax.data.pipeline import PreparedData
from mg3d_jax.data.tokens import ReportTokenizer
from mg3d_jax.evaluation import retrieval, zero_shot
from mg3d_jax.evaluation.embed import DataEmbedder, Embedder
from mg3d_jax.training.state import Setup


class OnlineEvaluation:
    """Scores parameters on `data`, in batches of `data.batch_size`, on the run's own mesh.

    Compiles once, reads every volume once per call, tokenises reports and prompts once. All processes must call it.
    Damaged records are left out as in training: named, in `log_folder` too, and at most `data.max_bad_records` of them.
    """

    def __init__(self, setup: Setup, tokenizer: ReportTokenizer, data: PreparedData, *, log_folder: Path | None = None):
        options, self._names = setup.config.data, data.label_names
        bad_records = {"log_folder": log_folder, "max_bad_records": options.max_bad_records}
        self._embed = DataEmbedder(Embedder(setup, tokenizer, options.batch_size), data, **bad_records)

    def metrics(self, params: Any) -> dict[str, float]:
        """`auroc_macro`, `auroc/CLASS`, and in both directions `report_to_volume/recall@K` and `.../median_rank`.

        Protocols: `zero_shot.PROTOCOL`, `retrieval.PROTOCOL`. A class without both outcomes has no AUROC and is not part
        of the macro mean, which is NaN where no class is left.
        """
        embedded = self._embed(params)
        scores = zero_shot.probabilities(embedded.volumes, embedded.prompts, embedded.logit_scale)
        by_class = zero_shot.auroc_by_class(embedded.labels, scores, self._names)
        found = retrieval.recall(embedded.volumes, embedded.report_id, embedded.reports, embedded.report_ids)
        ranks = {name: value for name, value in found.items() if "/recall@" in name or name.endswith("/median_rank")}
        classes = {f"auroc/{name}": value for name, value in by_class.items()}
        return {"auroc_macro": zero_shot.macro_mean(by_class)} | classes | ranks

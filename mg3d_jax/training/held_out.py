"""The loss on held-out data."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from mg3d_jax.data.pipeline import MoreText, PreparedData, evaluation_batches
from mg3d_jax.data.tokens import ReportTokenizer
from mg3d_jax.errors import UserError
from mg3d_jax.training import step as step_lib
from mg3d_jax.training.state import Setup


class HeldOut:
    """The loss on `data.valid`: every record once, the same views of the reports every time, no augmentation.

    Damaged records are left out as in training, and named in `log_folder`.
    """

    def __init__(
        self,
        setup: Setup,
        tokenizer: ReportTokenizer,
        data: PreparedData,
        more_text: MoreText,
        *,
        log_folder: Path | None = None,
    ):
        self.setup, self.tokenizer, self.data, self._log_folder = setup, tokenizer, data, log_folder
        self.more_text = more_text
        self.step = step_lib.evaluation_step(setup, tokenizer.special)

    def loss(self, params: Any) -> dict[str, float]:
        """Mean of every metric over the batches, weighted by their number of records."""
        key = jax.random.key(0)
        rows, weights = [], []
        for number, batch in enumerate(self._batches(self.setup.config.data.read_threads)):
            metrics = self.step(params, batch, jax.random.fold_in(key, number))
            rows.append(jax.device_get(jax.block_until_ready(metrics)))
            weights.append(rows[-1].pop("valid_share"))
        if not any(weights):
            raise UserError(f"every record of data.valid = {self.setup.config.data.valid} is damaged: prepare it again")
        return {name: float(np.average([row[name] for row in rows], weights=weights)) for name in rows[0]}

    def first_batch(self) -> dict[str, jax.Array]:
        """The batch whose reconstructions are drawn: the same every time."""
        return next(self._batches(threads=0))

    def _batches(self, threads: int) -> Iterator[dict[str, jax.Array]]:
        options = self.setup.config.data
        return evaluation_batches(
            self.data, self.tokenizer, self.setup.mesh, options.batch_size, threads=threads,
            log_folder=self._log_folder, max_bad_records=options.max_bad_records,
            more_text=self.more_text, stall_minutes=options.stall_minutes,
        )  # fmt: skip

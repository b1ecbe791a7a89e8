"""A trained run on this machine's devices, and the embeddings of volumes, reports and prompts."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from mg3d_jax import config as config_lib
from mg3d_jax import sharding
from mg3d_jax.data.pipeline import PreparedData, evaluation_batches
from mg3d_jax.data.tokens import ReportTokenizer
from mg3d_jax.progress import Progress
from mg3d_jax.training import inputs as step_inputs
from mg3d_jax.training.restore import restore_run


class TrainedModel:
    """One checkpoint of a run, ready to embed.

    Args:
        workdir: the run. step: which checkpoint; None is the newest.
        batch_size: volumes per call; rounded up to a multiple of the devices.

    Embeddings are float32 `[n, k]`, l2-normalised.
    """

    def __init__(self, workdir: Path, *, step: int | None = None, batch_size: int = 16):
        run = restore_run(workdir, step)
        self.config, self.setup, self.params, self.step = run.config, run.setup, run.params, int(run.meta["step"])
        self.tokenizer = ReportTokenizer(run.tokenizer, self.config.data.max_tokens, self.config.data.max_sentences)
        shards = sharding.batch_shards(self.setup.mesh)
        self.batch_size = math.ceil(batch_size / shards) * shards
        self._volumes = self._jitted(self._embed_volume)
        self._texts = self._jitted(lambda params, text: self._model_embedding(params, text, "embed_report"))

    def _model_embedding(self, params: Any, inputs: Any, method: str) -> jax.Array:
        features = self.setup.model.apply({"params": params}, inputs, method=method)
        embedding = features[method.removeprefix("embed_") + "_embedding"]
        return embedding / jax.numpy.maximum(jax.numpy.linalg.norm(embedding, axis=-1, keepdims=True), 1e-6)

    def _embed_volume(self, params: Any, volume: jax.Array) -> jax.Array:
        return self._model_embedding(params, step_inputs.window(volume, self.config.data.windows), "embed_volume")

    def _jitted(self, function: Callable) -> Callable[[Any], np.ndarray]:
        rows = sharding.batch_sharding(self.setup.mesh)
        jitted = jax.jit(
            function,
            in_shardings=(self.setup.shardings["params"], rows),
            out_shardings=sharding.replicated(self.setup.mesh),
        )

        def call(inputs: Any) -> np.ndarray:
            with sharding.in_mesh(self.setup.mesh):
                return jax.device_get(jitted(self.params, inputs))

        return call

    def volumes(self, data: PreparedData) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Embeddings of every record in order, and its `labels [n, L]`, `report_id [n]`, `patient_id [n]`."""
        embeddings, kept = [], {name: [] for name in ("labels", "report_id", "patient_id")}
        with Progress("embed", len(data), unit="volumes") as progress:
            for batch in evaluation_batches(data, self.tokenizer, self.setup.mesh, self.batch_size):
                valid = jax.device_get(batch["valid"])
                embeddings.append(self._volumes(batch["volume"])[valid])
                for name, rows in kept.items():
                    rows.append(jax.device_get(batch[name])[valid])
                progress.advance(int(valid.sum()))
        return np.concatenate(embeddings), {name: np.concatenate(rows) for name, rows in kept.items()}

    def texts(self, texts: Sequence[Sequence[str]]) -> np.ndarray:
        """One embedding per text, a text being a few sentences (a prompt is one)."""
        length = config_lib.text_tokens(self.config)
        tokenizer = ReportTokenizer(self.tokenizer.tokenizer, length, self.config.data.max_sentences)
        rows = [tokenizer(text) for text in texts]
        names = ("token_ids", "token_mask", "sentence_index")
        fields = {name: np.stack([row[name] for row in rows]) for name in names}
        embeddings = []
        for first in range(0, len(rows), self.batch_size):
            part = {
                name: _pad_rows(array[first : first + self.batch_size], self.batch_size)
                for name, array in fields.items()
            }
            embeddings.append(self._texts(part)[: len(rows) - first])
        return np.concatenate(embeddings)

    def reports(self, reports: Sequence[Sequence[str]]) -> np.ndarray:
        """One embedding per report.

        A model trained on single sentences embeds a report as the mean direction of its sentences; one trained on whole
        reports embeds it whole.
        """
        options = self.config.objectives.alignment
        if options.report_view == "report":
            return self.texts(reports)
        groups = [[[sentence] for sentence in report] or [[]] for report in reports]
        flat = self.texts([group for of_report in groups for group in of_report])
        ends = np.cumsum([len(g) for g in groups])[:-1]
        means = np.stack([part.mean(axis=0) for part in np.split(flat, ends)])
        return means / np.maximum(np.linalg.norm(means, axis=-1, keepdims=True), 1e-6)


def _pad_rows(array: np.ndarray, rows: int) -> np.ndarray:
    return np.concatenate([array, np.repeat(array[-1:], rows - len(array), axis=0)])

"""Embeddings of prepared data: volumes, distinct reports and texts of evaluations, on any mesh and number of processes."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from mg3d_jax import sharding
from mg3d_jax.data.pipeline import PreparedData, evaluation_batches, short_id
from mg3d_jax.data.record import Record
from mg3d_jax.data.tokens import ReportTokenizer
from mg3d_jax.evaluation.base import Embedded, Evaluation, Model
from mg3d_jax.models.mg3d import MAX_LOGIT_SCALE
from mg3d_jax.objectives.pairwise import l2_normalize
from mg3d_jax.progress import Progress
from mg3d_jax.training import inputs as step_inputs
from mg3d_jax.training.state import Setup

TEXT_FIELDS = ("token_ids", "token_mask", "sentence_index")
FACTS = ("labels", "report_id", "patient_id", "valid")  # of a batch, that come back with the embeddings
Sentences = Sequence[str]


@dataclass(frozen=True)
class TokenizedTexts:
    """Distinct texts, tokenised once, and which of them each entry is the mean direction of."""

    fields: dict[str, np.ndarray]  # TEXT_FIELDS, [distinct texts, T]
    rows: np.ndarray  # [parts], into `fields`
    entries: np.ndarray  # [parts], ascending: the entry that the part belongs to
    count: int  # entries


class Embedder:
    """Embeds texts and volumes with whatever parameters it is given; each is compiled once.

    Args:
        setup: of the run; parameters lie on its mesh.
        tokenizer: of the run, with its limits for whole reports.
        batch_size: volumes or texts per call, of all devices together; rounded up to a multiple of the batch shards.

    All processes of a run must call its methods, and all get the whole result.
    """

    def __init__(self, setup: Setup, tokenizer: ReportTokenizer, batch_size: int):
        self.setup, self.config, self.tokenizer = setup, setup.config, tokenizer
        shards = sharding.batch_shards(setup.mesh)
        self.batch_size = math.ceil(batch_size / shards) * shards
        places: dict[str, Any] = {
            "in_shardings": (setup.shardings["params"], sharding.batch_sharding(setup.mesh)),
            "out_shardings": sharding.replicated(setup.mesh),
        }
        self.width = self.config.model.projection_dim
        self._embed_volumes = jax.jit(self._volume_features, **places)
        self._embed_texts = jax.jit(self._text_features, **places)

    def _volume_features(self, params: Any, batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
        windowed = step_inputs.window(batch["volume"], self.config.data.windows)
        features = self.setup.model.apply({"params": params}, windowed, method="embed_volume")
        facts = {name: array for name, array in batch.items() if name != "volume"}
        return {"embedding": l2_normalize(features["volume_embedding"])} | facts

    def _text_features(self, params: Any, text: dict[str, jax.Array]) -> jax.Array:
        features = self.setup.model.apply({"params": params}, text, method="embed_report")
        return l2_normalize(features["report_embedding"])

    def volumes(
        self,
        params: Any,
        data: PreparedData,
        progress: Progress | None = None,
        *,
        on_record: Callable[[Record], None] | None = None,
        **bad_records: Any,
    ) -> dict[str, np.ndarray]:
        """`embedding` [n, k] of every record in order, with its `labels` [n, L], `report_id` and `patient_id` [n].

        `on_record` sees every record that this process reads. A damaged one is a `UserError`, or skipped and named as
        `bad_records`, the options of `evaluation_batches`, say.
        """
        names, found = ("embedding", "labels", "report_id", "patient_id"), []
        threads = self.config.data.read_threads
        batches = evaluation_batches(
            data, self.tokenizer, self.setup.mesh, self.batch_size, threads=threads, on_record=on_record, **bad_records
        )
        for batch in batches:
            with sharding.in_mesh(self.setup.mesh):
                rows = _fetch(self._embed_volumes(params, {name: batch[name] for name in ("volume", *FACTS)}))
            found.append({name: rows[name][rows["valid"]] for name in names})
            if progress is not None:
                progress.advance(int(rows["valid"].sum()))
        return {name: np.concatenate([rows[name] for rows in found]) for name in names}

    def volume(self, params: Any, hounsfield: np.ndarray) -> np.ndarray:
        """The embedding [k] of one volume, int16 HU [X, Y, Z]. Every device embeds it."""
        size = sharding.batch_shards(self.setup.mesh)
        local = np.broadcast_to(hounsfield, (len(sharding.local_rows(self.setup.mesh, size)), *hounsfield.shape))
        batch = sharding.to_global({"volume": local}, self.setup.mesh, size)
        with sharding.in_mesh(self.setup.mesh):
            return _fetch(self._embed_volumes(params, batch))["embedding"][0]

    def tokenize(self, entries: Sequence[Sequence[Sentences]]) -> TokenizedTexts:
        """Each entry is some texts, each text some sentences. At least one entry, each of at least one text."""
        length = self.config.text_tokens()
        tokenizer = ReportTokenizer(self.tokenizer.tokenizer, length, self.config.data.max_sentences)
        distinct: dict[tuple[str, ...], int] = {}
        rows = [distinct.setdefault(tuple(text), len(distinct)) for texts in entries for text in texts]
        tokens = [tokenizer(text) for text in distinct]
        fields = {name: np.stack([row[name] for row in tokens]) for name in TEXT_FIELDS}
        owners = np.repeat(np.arange(len(entries)), [len(texts) for texts in entries])
        return TokenizedTexts(fields, np.array(rows), owners, len(entries))

    def report_texts(self, sentences: Sentences) -> list[Sentences]:
        """A report as texts of the kind that the run was trained on.

        A model trained on single sentences embeds a report as the mean direction of its sentences; one trained on whole
        reports embeds it whole.
        """
        if self.config.objectives["alignment"].report_view == "report":
            return [sentences]
        return [[sentence] for sentence in sentences] or [[]]

    def texts(self, params: Any, texts: TokenizedTexts) -> np.ndarray:
        """One embedding per entry, [entries, k]."""
        total, size, found = len(texts.fields["token_ids"]), self.batch_size, []
        local = np.array(sharding.local_rows(self.setup.mesh, size))
        for first in range(0, total, size):
            rows = np.minimum(first + local, total - 1)  # the last text pads
            part = {name: array[rows] for name, array in texts.fields.items()}
            batch = sharding.to_global(part, self.setup.mesh, size)
            with sharding.in_mesh(self.setup.mesh):
                found.append(_fetch(self._embed_texts(params, batch))[: total - first])
        directions = np.concatenate(found)
        sums = np.zeros((texts.count, directions.shape[1]), np.float32)
        np.add.at(sums, texts.entries, directions[texts.rows])
        return np.asarray(l2_normalize(jnp.asarray(sums)))


@dataclass(frozen=True)
class _Texts:
    """All texts of a data set: reports first, then those of each evaluation."""

    report_ids: np.ndarray
    tokenized: TokenizedTexts | None  # None where there is no text at all
    ends: np.ndarray  # of the reports' entries, and of each evaluation's


class DataEmbedder:
    """`params -> {name: Embedded}`: one data set for several evaluations, each with its own texts; the rest is shared.

    Every volume is read once per call. Reports are collected from the records of the first call; all texts are tokenised
    once. `bad_records` as for `Embedder.volumes`.
    """

    def __init__(
        self, embedder: Embedder, data: PreparedData, evaluations: Mapping[str, Evaluation], **bad_records: Any
    ):
        self.embedder, self.data, self.evaluations, self.bad_records = embedder, data, evaluations, bad_records
        self.needs = {need for evaluation in evaluations.values() for need in evaluation.needs}
        self._texts: _Texts | None = None

    def __call__(self, params: Any, progress: Progress | None = None) -> dict[str, Embedded]:
        seen: dict[int, Sentences] = {}

        def keep(record: Record) -> None:
            seen[int(short_id(record.report_id))] = record.sentences

        found = self._no_volumes()
        if self.needs & {"volumes", "reports"}:
            on_record = keep if self._texts is None else None
            found = self.embedder.volumes(params, self.data, progress, on_record=on_record, **self.bad_records)
        if self._texts is None:
            self._texts = self._tokenize(from_all_processes(seen) if "reports" in self.needs else {})
        reports, *texts = self._embed_texts(params, self._texts)
        scale = logit_scale(params)
        return {
            name: Embedded(
                volumes=found["embedding"],
                labels=found["labels"],
                label_names=tuple(self.data.label_names),
                patient_id=found["patient_id"],
                report_id=found["report_id"],
                reports=reports,
                report_ids=self._texts.report_ids,
                texts=own,
                logit_scale=scale,
                model=Model(self.embedder, params, self.data) if "model" in evaluation.needs else None,
            )
            for (name, evaluation), own in zip(self.evaluations.items(), texts, strict=True)
        }

    def _no_volumes(self) -> dict[str, np.ndarray]:
        return {
            "embedding": np.zeros((0, self.embedder.width), np.float32),
            "labels": np.zeros((0, len(self.data.label_names)), np.int8),
            "patient_id": np.zeros(0, np.int32),
            "report_id": np.zeros(0, np.int32),
        }

    def _tokenize(self, reports: dict[int, Sentences]) -> _Texts:
        parts: list[list[Sequence[Sentences]]]
        parts = [[self.embedder.report_texts(sentences) for sentences in reports.values()]]
        parts += [[[text] for text in one.texts(self.data.label_names)] for one in self.evaluations.values()]
        entries = [entry for part in parts for entry in part]
        tokenized = self.embedder.tokenize(entries) if entries else None
        return _Texts(np.array(list(reports), np.int32), tokenized, np.cumsum([len(part) for part in parts]))

    def _embed_texts(self, params: Any, texts: _Texts) -> list[np.ndarray]:
        """The rows of the reports, then those of each evaluation's texts."""
        if texts.tokenized is None:
            return [np.zeros((0, self.embedder.width), np.float32) for _ in texts.ends]
        return np.split(self.embedder.texts(params, texts.tokenized), texts.ends[:-1])


def logit_scale(params: Any) -> float:
    """1 / temperature, within the limit of training."""
    return min(float(np.exp(np.asarray(jax.device_get(params["logit_scale"]), np.float64))), MAX_LOGIT_SCALE)


def _fetch(tree: Any) -> Any:
    """To the host, once all devices are done: fetching waits for one of them, and CPU devices must not drift apart."""
    return jax.device_get(jax.block_until_ready(tree))


def from_all_processes(reports: dict[int, Sentences]) -> dict[int, Sentences]:
    """The union of what each process holds, the same and in the same order (of the ids) on all of them."""
    pieces = [reports]
    if jax.process_count() > 1:
        own = np.frombuffer(json.dumps(list(reports.items())).encode(), np.uint8)
        lengths = multihost_utils.process_allgather(np.array([own.size], np.int32)).reshape(-1)
        padded = np.zeros(lengths.max(), np.uint8)
        padded[: own.size] = own
        gathered = multihost_utils.process_allgather(padded)
        pieces = [dict(json.loads(row[:n].tobytes())) for row, n in zip(gathered, lengths, strict=True)]
    union = {number: tuple(sentences) for piece in pieces for number, sentences in piece.items()}
    return dict(sorted(union.items()))

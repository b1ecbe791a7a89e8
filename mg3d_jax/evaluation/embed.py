"""Embeddings of prepared data: volumes, distinct reports and texts of evaluations, on any mesh and number of processes."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mg3d_jax import sharding
from mg3d_jax.data.pipeline import PreparedData, evaluation_batches
from mg3d_jax.data.record import RecordText
from mg3d_jax.data.tokens import ReportTokenizer
from mg3d_jax.errors import UserError
from mg3d_jax.evaluation.base import Embedded, Evaluation, Model, Phrasings, Prompts
from mg3d_jax.models.mg3d import MAX_LOGIT_SCALE
from mg3d_jax.objectives.pairwise import l2_normalize
from mg3d_jax.progress import Progress
from mg3d_jax.training import inputs as step_inputs
from mg3d_jax.training.state import Setup

TEXT_FIELDS = ("token_ids", "token_mask", "sentence_index")
FACTS = ("labels", "record_index", "valid")  # of a batch, that come back with the embeddings
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
        **bad_records: Any,
    ) -> dict[str, np.ndarray]:
        """`embedding` [n, k] of every record in order, with its `labels` [n, L] and `record_index` [n].

        A damaged record is a `UserError`, or skipped and named as `bad_records`, the options of `evaluation_batches`, say.
        """
        found = []
        for rows in self.volume_batches(params, data, **bad_records):
            found.append(rows)
            if progress is not None:
                progress.advance(len(rows["embedding"]))
        if not found:
            raise UserError(f"{', '.join(str(reader.folder) for reader in data.readers)}: there is no record to embed")
        return {name: np.concatenate([rows[name] for rows in found]) for name in found[0]}

    def volume_batches(
        self, params: Any, data: PreparedData, *, start: int = 0, **bad_records: Any
    ) -> Iterator[dict[str, np.ndarray]]:
        """Yields what `volumes` returns, batch by batch of `batch_size` records, from batch number `start` on."""
        batches = evaluation_batches(
            data, self.tokenizer, self.setup.mesh, self.batch_size, threads=self.config.data.read_threads, start=start,
            **bad_records,
        )  # fmt: skip
        for batch in batches:
            with sharding.in_mesh(self.setup.mesh):
                rows = _fetch(self._embed_volumes(params, {name: batch[name] for name in ("volume", *FACTS)}))
            yield {name: rows[name][rows["valid"]] for name in ("embedding", "labels", "record_index")}

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


PromptSets = Mapping[str, Mapping[str, Phrasings]]  # of an evaluation: set -> class -> (present, absent)


def prompt_entries(sets: PromptSets) -> list[list[Sentences]]:
    """What `Embedder.tokenize` takes: of each set the present prompts of all classes, then the absent ones."""
    return [
        [[sentence] for sentence in pair[side]]
        for by_class in sets.values()
        for side in (0, 1)
        for pair in by_class.values()
    ]


def prompts_of(sets: PromptSets, rows: np.ndarray) -> dict[str, Prompts]:
    """The sets of prompts from the embeddings of their `prompt_entries`, `[entries, k]`."""
    start, found = 0, {}
    for title, by_class in sets.items():
        end = start + 2 * len(by_class)
        found[title] = Prompts(tuple(by_class), rows[start:end].reshape(2, len(by_class), -1))
        start = end
    return found


class DataEmbedder:
    """`params -> {name: Embedded}`: one data set for several evaluations, each with its own texts; the rest is shared.

    Every volume is read once per call. All texts are tokenised once. `bad_records` as for `Embedder.volumes`.

    Args:
        train: volumes for the evaluations that need "train".
    """

    def __init__(
        self,
        embedder: Embedder,
        data: PreparedData,
        evaluations: Mapping[str, Evaluation],
        *,
        train: PreparedData | None = None,
        **bad_records: Any,
    ):
        self.embedder, self.data, self.train = embedder, data, train
        self.evaluations, self.bad_records = evaluations, bad_records
        self._texts: dict[str, TokenizedTexts | None] = {}  # by what they are of
        self._reports: dict[str, Sentences] = {}

    def __call__(
        self, params: Any, progress: Progress | None = None, *, only: Sequence[str] | None = None
    ) -> dict[str, Embedded]:
        """For all evaluations, or those of the names `only`."""
        wanted = {name: one for name, one in self.evaluations.items() if only is None or name in only}
        needs = {need for one in wanted.values() for need in one.needs}
        shared = self._labelled(params, self.data, progress, volumes=bool(needs & {"volumes", "reports"}))
        if "reports" in needs:
            shared = dataclasses.replace(shared, **self._embed_reports(params))
        if "train" in needs and self.train is not None:
            shared = dataclasses.replace(shared, train=self._labelled(params, self.train, progress, volumes=True))
        model, names = Model(self.embedder, params, self.data), self.data.label_names
        return {
            name: dataclasses.replace(
                shared,
                prompts=self._embed_prompts(params, name, one.prompts(names)),
                texts=self._embed_texts(params, f"texts of {name}", [[text] for text in one.texts(names)]),
                model=model if "model" in one.needs else None,
            )
            for name, one in wanted.items()
        }

    def _labelled(self, params: Any, data: PreparedData, progress: Progress | None, *, volumes: bool) -> Embedded:
        """The volumes of `data` with all that is known of them; none where `volumes` is False."""
        nothing = np.zeros((0, self.embedder.width), np.float32)
        found: dict[str, Any] = {
            "embedding": nothing,
            "labels": np.zeros((0, len(data.label_names)), np.int8),
            "record_index": [],
        }
        if volumes:
            found = self.embedder.volumes(params, data, progress, **self.bad_records)
        about = [data.text(index) for index in found["record_index"]]
        if data is self.data and not self._reports:
            self._reports = {text.report_id: text.sentences for text in about}
        return Embedded(
            volumes=found["embedding"],
            labels=found["labels"],
            label_names=tuple(data.label_names),
            volume_ids=_strings(about, "name"),
            scans=_strings(about, "scan"),
            patients=_strings(about, "patient"),
            volume_reports=_strings(about, "report_id"),
            reports=nothing,
            report_ids=np.zeros(0, str),
            report_texts=(),
            prompts={},
            texts=nothing,
            logit_scale=logit_scale(params),
        )

    def _embed_reports(self, params: Any) -> dict[str, Any]:
        entries = [self.embedder.report_texts(sentences) for sentences in self._reports.values()]
        return {
            "reports": self._embed_texts(params, "reports", entries),
            "report_ids": np.array(list(self._reports), str),
            "report_texts": tuple(self._reports.values()),
        }

    def _embed_prompts(self, params: Any, name: str, sets: PromptSets) -> dict[str, Prompts]:
        return prompts_of(sets, self._embed_texts(params, f"prompts of {name}", prompt_entries(sets)))

    def _embed_texts(self, params: Any, of: str, entries: Sequence[Sequence[Sentences]]) -> np.ndarray:
        if of not in self._texts:
            self._texts[of] = self.embedder.tokenize(entries) if entries else None
        tokenized = self._texts[of]
        if tokenized is None:
            return np.zeros((0, self.embedder.width), np.float32)
        return self.embedder.texts(params, tokenized)


def _strings(about: Sequence[RecordText], name: str) -> np.ndarray:
    return np.array([getattr(text, name) for text in about], str)


def logit_scale(params: Any) -> float:
    """1 / temperature, within the limit of training."""
    return min(float(np.exp(np.asarray(jax.device_get(params["logit_scale"]), np.float64))), MAX_LOGIT_SCALE)


def _fetch(tree: Any) -> Any:
    """To the host, once all devices are done: fetching waits for one of them, and CPU devices must not drift apart."""
    return jax.device_get(jax.block_until_ready(tree))

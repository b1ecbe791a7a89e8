"""Embeds prepared data with a model, on any mesh and number of processes.

`Embedder` embeds volumes and texts; `DataEmbedder` embeds all that a list of evaluations needs of one data set: its volumes,
each distinct report once, and the evaluations' own prompts and texts.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from mg3d_jax import sharding
from mg3d_jax.data.pipeline import PreparedData, evaluation_batches
from mg3d_jax.data.record import RecordText
from mg3d_jax.data.tokens import ReportTokenizer
from mg3d_jax.errors import UserError
from mg3d_jax.evaluation.base import Embedded, Evaluation, Model, Phrasings, Prompts, Text
from mg3d_jax.models.mg3d import MAX_LOGIT_SCALE, MG3D, text_embedding, volume_embedding
from mg3d_jax.objectives.base import REPORT_BIAS
from mg3d_jax.objectives.pairwise import l2_normalize
from mg3d_jax.progress import Progress
from mg3d_jax.training import inputs as step_inputs
from mg3d_jax.training.restore import RestoredRun
from mg3d_jax.training.state import Setup

TEXT_FIELDS = ("token_ids", "token_mask", "sentence_index")  # of a batch: what an embedding of a text is made from
PASSED_THROUGH = ("labels", "record_index", "valid")  # of a batch: what comes back beside the embeddings of its volumes


def stacked(tokenized: Sequence[Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """`TEXT_FIELDS` of several texts, or of several stacks of them: one more axis in front."""
    return {name: np.stack([text[name] for text in tokenized]) for name in TEXT_FIELDS}


@dataclass(frozen=True)
class TokenizedTexts:
    """Entries to embed, each distinct text of them tokenised once.

    An entry is one text, or several that are embedded as one (`models.mg3d.text_embedding` of the mean of their unit
    vectors): the sentences of a report, the phrasings of a prompt. A text is a list of sentences. The entries
    `[[["a"], ["b"]], [["a"]]]` have the distinct texts `["a"]` and `["b"]`, `rows` [0, 1, 0] and `entries` [0, 0, 1].
    """

    fields: dict[str, np.ndarray]  # TEXT_FIELDS, [distinct texts, T]
    rows: np.ndarray  # [texts of all entries]: the row of each in `fields`
    entries: np.ndarray  # [texts of all entries], ascending: the number of the entry that each belongs to
    count: int  # of entries


Program = Callable[[Any, dict[str, jax.Array]], Any]  # `(params, batch) -> arrays`


# Kept, so that all embedders of one model in a process share what JAX has traced.
@functools.lru_cache(maxsize=8)
def volume_program(model: MG3D, windows: tuple[tuple[float, float], ...]) -> Program:
    """Volumes of a batch to `embedding`, with all else that the batch holds."""

    def features(params: Any, batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
        windowed = step_inputs.window(batch["volume"], windows)
        found = model.apply({"params": params}, windowed, method="embed_volume")
        passed_through = {name: array for name, array in batch.items() if name != "volume"}
        return {"embedding": volume_embedding(params, found["volume_embedding"])} | passed_through

    return features


@functools.lru_cache(maxsize=8)
def text_program(model: MG3D) -> Program:
    """Tokenised texts (`TEXT_FIELDS`) to their directions `[n, k]`."""

    def features(params: Any, text: dict[str, jax.Array]) -> jax.Array:
        found = model.apply({"params": params}, text, method="embed_report")
        return l2_normalize(found["report_embedding"])

    return features


class Embedder:
    """Embeds volumes and texts with whatever parameters it is given. Embeddings are `[., k]` float32, l2-normalised.

    One function for volumes and one for texts, each compiled once.

    Args:
        setup: of the run; parameters lie on its mesh.
        tokenizer: of the run, with its limits for whole reports.
        batch_size: volumes or texts per call, of all devices together; rounded up to a multiple of
            `sharding.batch_shards`.

    All processes of a run must call its methods, and all get the whole result.
    """

    def __init__(self, setup: Setup, tokenizer: ReportTokenizer, batch_size: int):
        self.setup, self.config, self.tokenizer = setup, setup.config, tokenizer
        shards = sharding.batch_shards(setup.mesh)
        self.batch_size = math.ceil(batch_size / shards) * shards
        shardings: dict[str, Any] = {
            "in_shardings": (setup.shardings["params"], sharding.batch_sharding(setup.mesh)),
            "out_shardings": sharding.replicated(setup.mesh),
        }
        self.width = self.config.model.projection_dim  # k
        self._shardings = shardings
        self._compiled_volumes = self.compiled(volume_program(setup.model, self.config.data.windows))
        self._compiled_texts = self.compiled(text_program(setup.model))

    @classmethod
    def of_run(cls, run: RestoredRun, batch_size: int) -> Embedder:
        """For the parameters of a run, `run.params`."""
        options = run.config.data
        tokenizer = ReportTokenizer(run.tokenizer, options.max_tokens, options.max_sentences)
        return cls(run.setup, tokenizer, batch_size)

    def compiled(self, program: Program) -> Callable[..., Any]:
        """`(params, batch) -> arrays`, jitted for the mesh; every device gets the whole result."""
        return jax.jit(program, **self._shardings)

    def volumes(
        self,
        params: Any,
        data: PreparedData,
        progress: Progress | None = None,
        **bad_records: Any,
    ) -> dict[str, np.ndarray]:
        """`embedding` [n, k] of every record in order, with its `labels` [n, L] and `record_index` [n].

        Args:
            bad_records: `max_bad_records` and `log_folder` of `pipeline.evaluation_batches`: up to that many damaged
                records are left out, and named. Without these options a damaged record is a `UserError`.
        """
        batches = []
        for batch in self.volume_batches(params, data, progress=progress, **bad_records):
            batches.append(batch)
        if not batches:
            raise UserError(f"{', '.join(str(reader.folder) for reader in data.readers)}: there is no record to embed")
        return {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}

    def volume_batches(
        self,
        params: Any,
        data: PreparedData,
        *,
        start: int = 0,
        progress: Progress | None = None,
        **bad_records: Any,
    ) -> Iterator[dict[str, np.ndarray]]:
        """Yields what `volumes` returns, batch by batch of `batch_size` records, from batch number `start` on."""
        yield from self.walk(self._compiled_volumes, params, data, start=start, progress=progress, **bad_records)

    def walk(
        self, program: Callable[..., Any], params: Any, data: PreparedData, *, start: int = 0, fields: Sequence[str] = (),
        batch_size: int = 0, progress: Progress | None = None, **bad_records: Any,
    ) -> Iterator[dict[str, np.ndarray]]:  # fmt: skip
        """Yields what a program of `compiled` gives for the volumes of `data`, with their `labels` and `record_index`.

        Args:
            program: `(params, batch) -> {name: [rows, ...]}`; the batch has "volume", `PASSED_THROUGH` and `fields`.
            batch_size: another one than the embedder's, a multiple of `sharding.batch_shards`.
            progress: told how many volumes are done.
            start, bad_records: as for `volume_batches`.
        """
        batches = evaluation_batches(
            data, self.tokenizer, self.setup.mesh, batch_size or self.batch_size, threads=self.config.data.read_threads,
            start=start, **bad_records,
        )  # fmt: skip
        for batch in batches:
            with sharding.in_mesh(self.setup.mesh):
                rows = _fetch(program(params, {name: batch[name] for name in ("volume", *PASSED_THROUGH, *fields)}))
            if progress is not None:
                progress.advance(int(rows["valid"].sum()))
            yield {name: array[rows["valid"]] for name, array in rows.items() if name != "valid"}

    def volume(self, params: Any, hounsfield: np.ndarray) -> np.ndarray:
        """The embedding [k] of one volume, int16 HU [X, Y, Z]."""
        # The smallest batch that the mesh can hold: a copy of the volume for each shard.
        size = sharding.batch_shards(self.setup.mesh)
        local = np.broadcast_to(hounsfield, (len(sharding.local_rows(self.setup.mesh, size)), *hounsfield.shape))
        batch = sharding.to_global({"volume": local}, self.setup.mesh, size)
        with sharding.in_mesh(self.setup.mesh):
            return _fetch(self._compiled_volumes(params, batch))["embedding"][0]

    def tokenize(self, entries: Sequence[Sequence[Text]]) -> TokenizedTexts:
        """Tokenises `entries` (see `TokenizedTexts`): at least one, each of at least one text. Texts are cut at the length
        that the run was trained with (`Config.text_tokens`)."""
        length = self.config.text_tokens()
        tokenizer = ReportTokenizer(self.tokenizer.tokenizer, length, self.config.data.max_sentences)
        distinct: dict[tuple[str, ...], int] = {}  # text -> its row
        rows = [distinct.setdefault(tuple(text), len(distinct)) for texts in entries for text in texts]
        fields = stacked([tokenizer(text) for text in distinct])
        entry_of_text = np.repeat(np.arange(len(entries)), [len(texts) for texts in entries])
        return TokenizedTexts(fields, np.array(rows), entry_of_text, len(entries))

    def report_texts(self, sentences: Text) -> list[Text]:
        """The entry of `tokenize` for a report: texts of the kind that the run was trained on.

        A model trained on single sentences embeds a report as the mean direction of its sentences; one trained on whole
        reports embeds it whole.
        """
        if self.config.objectives["alignment"].report_view == "report":
            return [sentences]
        return [[sentence] for sentence in sentences] or [[]]  # without sentences: one empty text

    def in_batches(self, program: Callable[..., Any], params: Any, fields: Mapping[str, np.ndarray]) -> Iterator[Any]:
        """Yields what a program of `compiled` gives, arrays [rows, ...], for `batch_size` rows of `fields` at a time; the last
        may be fewer."""
        total, size = len(next(iter(fields.values()))), self.batch_size
        local = np.array(sharding.local_rows(self.setup.mesh, size))  # rows of a batch that this process holds
        for first in range(0, total, size):
            rows = np.minimum(first + local, total - 1)  # the last batch is filled with copies of the last row
            batch = sharding.to_global({name: array[rows] for name, array in fields.items()}, self.setup.mesh, size)
            with sharding.in_mesh(self.setup.mesh):
                found = _fetch(program(params, batch))
            yield jax.tree.map(lambda array, here=total - first: array[:here], found)

    def texts(self, params: Any, texts: TokenizedTexts) -> np.ndarray:
        """One embedding per entry, [entries, k]."""
        directions = np.concatenate(list(self.in_batches(self._compiled_texts, params, texts.fields)))
        sums = np.zeros((texts.count, directions.shape[1]), np.float32)
        np.add.at(sums, texts.entries, directions[texts.rows])
        means = sums / np.bincount(texts.entries, minlength=texts.count)[:, None].astype(np.float32)
        bias = {name: jax.device_get(params[name]) for name in (REPORT_BIAS,) if name in params}
        return np.asarray(text_embedding(bias, means))


PromptSets = Mapping[str, Mapping[str, Phrasings]]  # what `Evaluation.prompts` returns


def prompt_entries(sets: PromptSets) -> list[list[Text]]:
    """The entries of `Embedder.tokenize` for these prompts: set by set, present before absent, class by class. The
    phrasings of a prompt are the texts of its entry."""
    return [
        [[sentence] for sentence in pair[side]]
        for by_class in sets.values()
        for side in (0, 1)
        for pair in by_class.values()
    ]


def embedded_prompts(sets: PromptSets, embeddings: np.ndarray) -> dict[str, Prompts]:
    """The sets with the embeddings `[entries, k]` of their `prompt_entries`."""
    start, prompts = 0, {}
    for name, by_class in sets.items():
        end = start + 2 * len(by_class)
        prompts[name] = Prompts(tuple(by_class), embeddings[start:end].reshape(2, len(by_class), -1))
        start = end
    return prompts


class DataEmbedder:
    """Embeds one data set for several evaluations: `params -> {name of the evaluation: Embedded}`.

    The evaluations share the embeddings of volumes and reports; prompts and texts are each one's own. Every volume is read
    once per call; texts are tokenised in the first call only.

    Args:
        train: training volumes, for the evaluations that need "train".
        bad_records: as for `Embedder.volumes`.
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
        # By what they are: "reports", "prompts of EVALUATION", "texts of EVALUATION". None where there are none.
        self._tokenized: dict[str, TokenizedTexts | None] = {}
        # The sentences of every report of `data`, by report id; filled when its volumes are embedded for the first time.
        self._reports: dict[str, Text] = {}

    def __call__(
        self, params: Any, progress: Progress | None = None, *, only: Sequence[str] | None = None
    ) -> dict[str, Embedded]:
        """For all evaluations, or those of the names `only`."""
        wanted = {name: one for name, one in self.evaluations.items() if only is None or name in only}
        needs = {need for one in wanted.values() for need in one.needs}
        shared = self._embed_volumes(params, self.data, progress, skip=not needs & {"volumes", "reports"})
        if "reports" in needs:
            shared = dataclasses.replace(shared, **self._embed_reports(params))
        if "train" in needs and self.train is not None:
            shared = dataclasses.replace(shared, train=self._embed_volumes(params, self.train, progress))
        model = Model(self.embedder, params, self.data, self.train, shows=progress is not None)
        label_names = self.data.label_names
        return {
            name: dataclasses.replace(
                shared,
                prompts=self._embed_prompts(params, name, one.prompts(label_names)),
                texts=self._embed_texts(params, f"texts of {name}", [[text] for text in one.texts(label_names)]),
                model=model if "model" in one.needs else None,
            )
            for name, one in wanted.items()
        }

    def _embed_volumes(
        self, params: Any, data: PreparedData, progress: Progress | None, *, skip: bool = False
    ) -> Embedded:
        """The volumes of `data` with their labels and ids, and the reports of `self.data` remembered; no texts yet.

        Args:
            skip: read no volume, and leave the arrays of volumes empty.
        """
        no_embeddings = np.zeros((0, self.embedder.width), np.float32)
        volumes: dict[str, Any] = {
            "embedding": no_embeddings,
            "labels": np.zeros((0, len(data.label_names)), np.int8),
            "record_index": [],
        }
        if not skip:
            volumes = self.embedder.volumes(params, data, progress, **self.bad_records)
        records = [data.text(index) for index in volumes["record_index"]]
        if data is self.data and not self._reports:
            self._reports = {record.report_id: record.sentences for record in records}
        return Embedded(
            volumes=volumes["embedding"],
            labels=volumes["labels"],
            label_names=tuple(data.label_names),
            volume_ids=_strings(records, "name"),
            scans=_strings(records, "scan"),
            patients=_strings(records, "patient"),
            volume_reports=_strings(records, "report_id"),
            reports=no_embeddings,
            report_ids=np.zeros(0, str),
            report_texts=(),
            prompts={},
            texts=no_embeddings,
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
        return embedded_prompts(sets, self._embed_texts(params, f"prompts of {name}", prompt_entries(sets)))

    def _embed_texts(self, params: Any, key: str, entries: Sequence[Sequence[Text]]) -> np.ndarray:
        """`[entries, k]`. The entries of a `key` are tokenised the first time, and must be the same every time."""
        if key not in self._tokenized:
            self._tokenized[key] = self.embedder.tokenize(entries) if entries else None
        tokenized = self._tokenized[key]
        if tokenized is None:
            return np.zeros((0, self.embedder.width), np.float32)
        return self.embedder.texts(params, tokenized)


def _strings(records: Sequence[RecordText], field: str) -> np.ndarray:
    return np.array([getattr(record, field) for record in records], str)


def logit_scale(params: Any) -> float:
    """1 / temperature, at most `MAX_LOGIT_SCALE` as in training."""
    return min(float(np.exp(np.asarray(jax.device_get(params["logit_scale"]), np.float64))), MAX_LOGIT_SCALE)


def _fetch(tree: Any) -> Any:
    """To the host, once all devices are done. `device_get` alone waits for only one of them, and CPU devices that get
    several computations apart deadlock in their collectives."""
    return jax.device_get(jax.block_until_ready(tree))

"""Prepared records -> grain -> host batches -> global arrays on the mesh.

The data position is one integer, the step: batch N holds positions `N * B ... (N + 1) * B - 1` of an endless, seeded,
per-epoch shuffled order of the records (see `order`), for any number of processes, workers or devices. Each
process reads only the rows that lie on its own devices; starting at step N means building the iterator there, nothing is
replayed. A record that turns out damaged keeps its row, with `valid = False` (see `bad_records`).
"""

from __future__ import annotations

import hashlib
import itertools
import math
import signal
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any

import grain
import numpy as np
from jax.sharding import Mesh

from mg3d_jax import sharding
from mg3d_jax.batch import AIR_HU, UNKNOWN_LABEL
from mg3d_jax.config.parts import DataConfig
from mg3d_jax.data import feed
from mg3d_jax.data.bad_records import BadRecords
from mg3d_jax.data.order import RecordOrder, reports_of_others
from mg3d_jax.data.record import Record, RecordText
from mg3d_jax.data.records import RecordReader
from mg3d_jax.data.shard_reader import DamagedRecordError
from mg3d_jax.data.tokens import ReportTokenizer
from mg3d_jax.errors import UserError

PREFETCHED_BATCHES = 2
SAMPLED_REPORTS = 200
TOKENIZER_RECORDS = 2000  # whose reports a new tokenizer is trained on
Row = dict[str, Any]  # what a batch holds of one record, without its volume: arrays and NumPy scalars
MoreText = Callable[[Sequence[str]], Row]  # sentences of a report -> the fields that objectives add (`objectives.base`)


def no_more_text(sentences: Sequence[str]) -> Row:
    """No fields beyond those of `mg3d_jax.batch`."""
    return {}


class PreparedData:
    """One or several prepared folders as one random-access sequence of records.

    Args:
        folders: outputs of `mg3d prepare` with the same grid and label names.
        max_patients: keep the records of the first K patients of each folder only (nested subsets); 0 = all.
        percent: keep the first so many percent of the patients of each folder, at least one, in the same nesting; 0 = all.
        subset_seed: which patients come first: as prepared (0), or in an order drawn from this seed and their names, so that
            subsets of one seed are nested, and patients that join a folder leave the order of the others as it was.
        volume_size: what the model expects; a folder with another grid is an error. None accepts any.
        masks: batches get the field "mask": a folder without masks is an error. False leaves masks out.
    """

    def __init__(
        self, folders: tuple[str, ...], *, max_patients: int = 0, percent: float = 0.0, subset_seed: int = 0,
        volume_size: tuple[int, int, int] | None = None, masks: bool = False,
    ):  # fmt: skip
        if isinstance(folders, str):
            folders = (folders,)
        if not folders:
            raise UserError("no prepared data given: set data.train to the output folder of `mg3d prepare`")
        self.readers = [RecordReader(Path(folder)) for folder in folders]
        manifests = [reader.manifest for reader in self.readers]
        self.label_names, self.grid = manifests[0]["label_names"], tuple(manifests[0]["grid"])
        self.masks, self.mask_names = masks, manifests[0].get("mask_names", [])  # names of classes, background first
        # mm, or None where it differs between the volumes: a "fraction" of each scan, or folders of several spacings.
        spacing = manifests[0]["spacing"]
        self.spacing = spacing if all(manifest["spacing"] == spacing for manifest in manifests) else None
        for folder, manifest in zip(folders, manifests, strict=True):
            grid = tuple(manifest["grid"])
            if volume_size is not None and grid != tuple(volume_size):
                raise UserError(
                    f"{folder} was prepared with grid {grid}, but model.volume_size = {tuple(volume_size)}: "
                    f"prepare again with --size {' '.join(map(str, volume_size))} or set --config.model.volume_size={grid}"
                )
            if grid != self.grid or manifest["label_names"] != self.label_names:
                raise UserError(f"{folder} and {folders[0]} differ in grid or label names: they cannot be mixed")
            if masks and not manifest.get("mask_names"):
                raise UserError(f"{folder} has no masks, which a task needs: prepare a data set that has some")
            if masks and manifest["mask_names"] != self.mask_names:
                raise UserError(f"{folder} and {folders[0]} differ in the classes of their masks: they cannot be mixed")
        most = max(len(manifest["patients"]) for manifest in manifests)
        if max_patients > most:
            raise UserError(f"data.max_patients = {max_patients}, but there are only {most} patients in {folders}")
        kept = [subset_of(manifest["patients"], max_patients, percent, subset_seed) for manifest in manifests]
        self.patients = sum(len(one.counts) for one in kept)
        self.records_of_patients = [one.counts for one in kept]
        self.lengths = [sum(counts) for counts in self.records_of_patients]
        self._numbers = [one.numbers for one in kept]

    def __len__(self) -> int:
        return sum(self.lengths)

    def contents(self) -> list[str]:
        """A digest of the records of each folder, as their manifests have it."""
        return [reader.content() for reader in self.readers]

    def locate(self, index: int) -> tuple[RecordReader, int]:
        """(reader of the folder, index in that folder) of record `index`."""
        rest = int(index)
        for reader, length, numbers in zip(self.readers, self.lengths, self._numbers, strict=True):
            if 0 <= rest < length:
                return reader, int(numbers[rest])
            rest -= length
        raise IndexError(f"record {index} of {len(self)}")

    def read(self, index: int, out: np.ndarray | None = None) -> Record:
        """Record `index`; its volume is decoded into `out` (int16 [X, Y, Z]) where that is given: no further copy."""
        reader, number = self.locate(index)
        return reader.read_into(number, out)

    def text(self, index: int) -> RecordText:
        """The words of record `index`, without reading its volume (and so without its checksum)."""
        reader, number = self.locate(index)
        return reader.text(number)

    def read_unless_bad(self, index: int, bad: BadRecords | None, out: np.ndarray | None = None) -> Record | None:
        """As `read`; None for a damaged record, which `bad` is told of. Without `bad` it is an error."""
        try:
            return self.read(index, out)
        except DamagedRecordError as error:
            if bad is None:
                raise
            self.note(index, bad, error)
            return None

    def note(self, index: int, bad: BadRecords, error: DamagedRecordError) -> None:
        """Tells `bad` that record `index` is damaged."""
        reader, number = self.locate(index)
        bad.add(reader.folder, number, reader.name(number), str(error))


@dataclass(frozen=True)
class Subset:
    """Patients of one folder: how many records each has, and the numbers of these in the folder, ascending."""

    counts: list[int]
    numbers: Sequence[int] | np.ndarray


def subset_of(patients: Sequence[tuple[str, int]], max_patients: int, percent: float, subset_seed: int) -> Subset:
    """Args:
    patients: name and number of records of each, in the order of the records, as the manifest has them.
    max_patients, percent, subset_seed: as for `PreparedData`.
    """
    wanted = max_patients or len(patients)
    if percent:
        wanted = max(1, round(len(patients) * percent / 100))
    counts = [count for _, count in patients]
    if not subset_seed or wanted >= len(patients):
        return Subset(counts[:wanted], range(sum(counts[:wanted])))
    drawn = [hashlib.sha256(f"{subset_seed}:{name}".encode()).digest() for name, _ in patients]
    places = sorted(sorted(range(len(patients)), key=drawn.__getitem__)[:wanted])
    ends = np.cumsum(counts)
    numbers = np.concatenate([np.arange(ends[k] - counts[k], ends[k]) for k in places])
    return Subset([counts[k] for k in places], numbers)


def record_names(data: PreparedData, indices: Iterable[int]) -> list[str]:
    """`["FOLDER: name of the volume", ...]` of records, as `record_index` of a batch counts them."""
    places = (data.locate(index) for index in indices)
    return [f"{reader.folder}: {reader.name(number)}" for reader, number in places]


def skipped_records(data: PreparedData, log_folder: Path | None, limit: int) -> BadRecords:
    """Where training notes the damaged records that it skips: at most `limit`, `data.max_bad_records`, and at most half of
    all. A set that is bad for the larger part is another fault than a flipped byte."""
    return BadRecords(log_folder, min(limit, len(data) // 2))


def tokenizer_sentences(options: DataConfig, log_folder: Path | None = None) -> set[str]:
    """What a tokenizer is trained on: the sentences of the first 2,000 records.

    These are records of the whole training set, not of the `max_patients` subset: the runs of a sweep over data size share
    their vocabulary. Damaged ones are skipped as in `train_batches`.
    """
    data = PreparedData(options.train)
    sentences: set[str] = set()
    bad = skipped_records(data, log_folder, options.max_bad_records)
    for index in range(min(len(data), TOKENIZER_RECORDS)):
        try:
            sentences.update(data.text(index).sentences)
        except DamagedRecordError as error:
            data.note(index, bad, error)
    return sentences


def cut_shares(data: PreparedData, tokenizer: ReportTokenizer, sentence_tokens: int) -> tuple[float, float]:
    """What the limits cut, in a sample of reports spread over the data: the share of reports that are longer than
    `tokenizer` keeps, and of sentences longer than `sentence_tokens` (special tokens included)."""
    step = max(1, len(data) // SAMPLED_REPORTS)
    reports: dict[str, tuple[str, ...]] = {}
    for index in range(0, len(data), step):
        with suppress(DamagedRecordError):  # training names what it meets; this is a sample
            text = data.text(index)
            reports[text.report_id] = text.sentences
    cut = [tokenizer.is_cut(sentences) for sentences in reports.values()]
    long = [n + 2 > sentence_tokens for sentences in reports.values() for n in tokenizer.lengths(sentences)]
    return sum(cut) / max(len(cut), 1), sum(long) / max(len(long), 1)


def short_id(text: str) -> np.int32:
    """A stable non-negative 31-bit id. Two different texts collide with probability 2^-31, and then are only not negatives."""
    return np.int32(int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") >> 1)


class BatchReader:
    """Reads records straight into the rows of host batches. Token arrays are cached by report: they never change.

    Args:
        bad: is told of damaged records, whose rows become `valid = False`: air, an empty report, unknown labels. Without
            it a damaged record is an error.
        more_text: further fields of a report.
    """

    def __init__(
        self,
        data: PreparedData,
        tokenizer: ReportTokenizer,
        bad: BadRecords | None = None,
        more_text: MoreText = no_more_text,
    ):
        self.data, self.tokenizer, self.bad, self.more_text = data, tokenizer, bad, more_text
        self._tokens: dict[str, Row] = {}
        self._other_texts: dict[int, Row | None] = {}

    def __call__(self, indices: Sequence[int], reports: Sequence[int] | None = None) -> dict[str, np.ndarray]:
        """One batch of the records `indices`; with `reports` their texts come from those records instead."""
        volumes = np.empty((len(indices), *self.data.grid), np.int16)
        rows: list[Row] = []
        for row, index in enumerate(indices):
            record = self.data.read_unless_bad(index, self.bad, volumes[row])
            text = None
            if record is not None:
                text = self._text(record) if reports is None else self._text_of(reports[row])
            if record is None or text is None:
                volumes[row] = AIR_HU
                rows.append(self._empty_row(index))
            else:
                rows.append(text | self._facts(record, index))
        return {name: np.stack([row[name] for row in rows]) for name in rows[0]} | {"volume": volumes}

    def _mask(self, mask: np.ndarray | None) -> Row:
        """The mask where batches have one; of a record without, every voxel is unknown."""
        if not self.data.masks:
            return {}
        return {"mask": np.full(self.data.grid, UNKNOWN_LABEL, np.int8) if mask is None else mask}

    def _facts(self, record: Record, index: int) -> Row:
        return self._mask(record.mask) | {
            "labels": record.labels,
            "patient_id": short_id(record.patient),
            "valid": np.bool_(True),
            "record_index": np.int32(index),
        }

    def _empty_row(self, index: int) -> Row:
        return (
            self._fields(())
            | self._mask(None)
            | {
                "report_id": np.int32(-1),  # no text's and no patient's id is negative
                "labels": np.full(len(self.data.label_names), UNKNOWN_LABEL, np.int8),
                "patient_id": np.int32(-1),
                "valid": np.bool_(False),
                "record_index": np.int32(index),
            }
        )

    def _text(self, record: Record) -> Row:
        if record.report_id not in self._tokens:
            fields = self._fields(record.sentences)
            self._tokens[record.report_id] = fields | {"report_id": short_id(record.report_id)}
        return self._tokens[record.report_id]

    def _fields(self, sentences: Sequence[str]) -> Row:
        return self.tokenizer(sentences) | self.more_text(sentences)

    def _text_of(self, index: int) -> Row | None:
        """The text of record `index` alone, None if it is damaged. Kept by index: the record is read once only."""
        if index not in self._other_texts:
            record = self.data.read_unless_bad(index, self.bad)
            self._other_texts[index] = None if record is None else self._text(record)
        return self._other_texts[index]


class LocalBatches:
    """Random access to this process's rows of the batches `start ... stop - 1`: what grain reads from.

    Args:
        rows: of every batch of `batch_size`, those that this process holds.
        order: position (batch number * batch_size + row) -> record index.
        report_of: record index -> index of the record whose report it gets; None for its own.
    """

    def __init__(
        self, reader: BatchReader, order: RecordOrder, rows: Sequence[int], batch_size: int, *, start: int, stop: int,
        report_of: np.ndarray | None = None,
    ):  # fmt: skip
        self.reader, self.order, self.rows, self.batch_size = reader, order, rows, batch_size
        self.start, self.stop, self.report_of = start, stop, report_of

    def __len__(self) -> int:
        return self.stop - self.start

    def __getitem__(self, i: int) -> dict[str, np.ndarray]:
        first = (self.start + i) * self.batch_size
        indices = [self.order[first + row] for row in self.rows]
        return self.reader(indices, None if self.report_of is None else [int(self.report_of[j]) for j in indices])


class EvaluationBatches:
    """Random access to this process's `rows` of the batches of all records in order, from batch `start` on; rows beyond the
    end are not valid."""

    def __init__(self, reader: BatchReader, rows: Sequence[int], batch_size: int, start: int = 0):
        self.reader, self.rows, self.batch_size, self.start = reader, rows, batch_size, start

    def __len__(self) -> int:
        return max(0, math.ceil(len(self.reader.data) / self.batch_size) - self.start)

    def __getitem__(self, i: int) -> dict[str, np.ndarray]:
        records = len(self.reader.data)
        positions = np.array([(self.start + i) * self.batch_size + row for row in self.rows])
        local = self.reader([min(int(position), records - 1) for position in positions])
        local["valid"] &= positions < records
        return local


@contextmanager
def _sigterm_blocked() -> Iterator[None]:
    """Threads and processes started in here never get SIGTERM (they inherit the mask); the caller gets it afterwards.

    SLURM signals every process of a step. The trainer saves and leaves; until then it needs its workers, which for their
    first seconds import and could not ignore a signal yet.
    """
    resource_tracker.ensure_running()  # now: starting it in here would unblock the signal
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def host_batches(
    source: LocalBatches | EvaluationBatches, *, threads: int, workers: int
) -> Generator[dict[str, np.ndarray]]:
    """The batches of `source` in order, read ahead in `threads` threads, in each of `workers` processes if there are any.
    Close the iterator where it is left early."""
    # The elements are whole batches: threads and workers take turns by them, so the order stays.
    options = grain.ReadOptions(
        num_threads=threads, prefetch_buffer_size=max(PREFETCHED_BATCHES, threads) if threads else 0
    )
    dataset = grain.MapDataset.source(source).to_iter_dataset(options)
    if workers:
        from absl import flags

        if not flags.FLAGS.is_parsed():  # grain's workers read absl flags
            flags.FLAGS.mark_as_parsed()
        dataset = dataset.mp_prefetch(grain.MultiprocessingOptions(num_workers=workers))
    iterator = iter(dataset)
    try:
        with _sigterm_blocked() if workers else nullcontext():
            # Starts the workers. As an iterator, because one that is used up lets go of its batch.
            first = iter(list(itertools.islice(iterator, 1)))
        yield from first
        yield from iterator
    finally:
        if hasattr(iterator, "close"):
            iterator.close()


def train_batches(
    data: PreparedData, tokenizer: ReportTokenizer, options: DataConfig, mesh: Mesh, *, seed: int, start: int, stop: int,
    accumulation: int = 1, log_folder: Path | None = None, more_text: MoreText = no_more_text,
) -> Iterator[dict]:  # fmt: skip
    """Global batches of steps `start ... stop - 1`, as sharded arrays. Read ahead in threads, or in `workers` processes.

    The order follows from `seed`; the folders mix by `data.weights`. A batch must be divisible by the devices of the mesh's
    batch axis times `accumulation`, the parts in which the step takes it. Damaged records are skipped (`valid = False`) and
    named in a warning and in `bad_records.jsonl` of `log_folder`, which all processes of the run share; more than
    `data.max_bad_records`, or more than half of all records, raise `UserError`. What `feed` notices while a batch is waited for
    is raised, too.
    """
    size, parts = options.batch_size, sharding.batch_shards(mesh) * accumulation
    if size % parts:
        raise UserError(
            f"data.batch_size = {size} is not divisible by the mesh's data * fsdp * accumulation = {parts}: "
            f"use a multiple of {parts}"
        )
    source = LocalBatches(
        BatchReader(data, tokenizer, skipped_records(data, log_folder, options.max_bad_records), more_text),
        RecordOrder(data.lengths, options.weights, seed=seed),
        sharding.local_rows(mesh, size), size, start=start, stop=stop,
        report_of=reports_of_others(data.records_of_patients, seed=seed) if options.shuffle_reports else None,
    )  # fmt: skip
    batches = host_batches(source, threads=options.read_threads, workers=options.workers)
    batches = feed.watched(batches, 60 * options.stall_minutes)
    try:
        for local in batches:
            yield sharding.to_global(local, mesh, size)
    finally:
        batches.close()


def evaluation_batches(
    data: PreparedData, tokenizer: ReportTokenizer, mesh: Mesh, batch_size: int, *, threads: int,
    log_folder: Path | None = None, max_bad_records: int = 0, start: int = 0, more_text: MoreText = no_more_text,
    stall_minutes: float = 0.0,
) -> Iterator[dict]:  # fmt: skip
    """Every record once, in order, from batch number `start` on; the last batch is padded with `valid = False` rows. Read
    ahead in `threads` threads.

    A damaged record is a `UserError`: results are of all records. With `max_bad_records` as many are skipped as in
    `train_batches`, for the held-out loss during training. What `feed` notices while a batch is waited for is raised.
    """
    bad = BadRecords(log_folder, max_bad_records) if max_bad_records else None
    reader = BatchReader(data, tokenizer, bad, more_text)
    source = EvaluationBatches(reader, sharding.local_rows(mesh, batch_size), batch_size, start)
    batches = feed.watched(host_batches(source, threads=threads, workers=0), 60 * stall_minutes)
    try:
        for local in batches:
            feed.look_up(together=True)
            yield sharding.to_global(local, mesh, batch_size)
    finally:
        batches.close()

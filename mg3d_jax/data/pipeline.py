"""Prepared records -> grain -> host batches -> global arrays on the mesh.

The data position is one integer, the step: batch N holds positions `N * B ... (N + 1) * B - 1` of an endless, seeded,
per-epoch shuffled order of the records, whatever the number of processes, workers or devices. Each process reads only
the rows that lie on its own devices; starting at step N means building the iterator there, nothing is replayed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import grain
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from mg3d_jax import sharding
from mg3d_jax.data.records import Record, RecordReader
from mg3d_jax.data.tokens import ReportTokenizer
from mg3d_jax.errors import UserError

PREFETCHED_BATCHES = 2


class PreparedData:
    """One or several prepared folders as one random-access sequence of records.

    Args:
        folders: outputs of `mg3d prepare` with the same grid and label names.
        max_patients: keep the records of the first K patients of each folder only (nested subsets); 0 = all.
        volume_size: what the model expects; a folder with another grid is an error. None accepts any.
    """

    def __init__(
        self, folders: tuple[str, ...], *, max_patients: int = 0, volume_size: tuple[int, int, int] | None = None
    ):
        if isinstance(folders, str):
            folders = (folders,)
        if not folders:
            raise UserError("no prepared data given: set data.train to the output folder of `mg3d prepare`")
        self.readers = [RecordReader(Path(folder)) for folder in folders]
        first = self.readers[0].manifest
        self.label_names, self.grid, self.spacing = first["label_names"], tuple(first["grid"]), first["spacing"]
        for folder, reader in zip(folders, self.readers, strict=True):
            grid = tuple(reader.manifest["grid"])
            if volume_size is not None and grid != tuple(volume_size):
                raise UserError(
                    f"{folder} was prepared with grid {grid}, but model.volume_size = {tuple(volume_size)}: "
                    f"prepare again with --size {' '.join(map(str, volume_size))} or set --config.model.volume_size={grid}"
                )
            if grid != self.grid or reader.manifest["label_names"] != self.label_names:
                raise UserError(f"{folder} and {folders[0]} differ in grid or label names: they cannot be mixed")
        counts = [reader.manifest["patients"][: max_patients or None] for reader in self.readers]
        if max_patients > max(len(c) for c in counts):
            raise UserError(
                f"data.max_patients = {max_patients}, but there are only {max(map(len, counts))} patients in {folders}"
            )
        self.patients = sum(map(len, counts))
        self.lengths = [sum(n for _, n in c) for c in counts]
        self.report_tokenizer: ReportTokenizer | None = None

    def __len__(self) -> int:
        return sum(self.lengths)

    def read(self, index: int, out: np.ndarray | None = None) -> Record:
        """Record `index`; its volume is decoded into `out` (int16 [X, Y, Z]) where that is given: no further copy."""
        for reader, length in zip(self.readers, self.lengths, strict=True):
            if index < length:
                return reader.read_into(index, out)
            index -= length
        raise IndexError(index)

    def records(self) -> Iterator[Record]:
        """All records in order."""
        return (self.read(i) for i in range(len(self)))


def short_id(text: str) -> np.int32:
    """A stable non-negative 31-bit id. Two different texts collide with probability 2^-31, and then are only not negatives."""
    return np.int32(int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") >> 1)


class BatchReader:
    """Reads records straight into the rows of host batches. Token arrays are cached by report: they never change."""

    def __init__(self, data: PreparedData, tokenizer: ReportTokenizer):
        self.data, self.tokenizer = data, tokenizer
        self._tokens: dict[str, dict[str, np.ndarray]] = {}

    def __call__(self, indices: Sequence[int], reports: Sequence[int] | None = None) -> dict[str, np.ndarray]:
        """One batch of the records `indices`; with `reports` their texts come from those records instead."""
        volumes = np.empty((len(indices), *self.data.grid), np.int16)
        rows = [self._row(index, volumes[row]) for row, index in enumerate(indices)]
        if reports is not None:
            rows = [row | self._text(self.data.read(other)) for row, other in zip(rows, reports, strict=True)]
        return {name: np.stack([row[name] for row in rows]) for name in rows[0]} | {"volume": volumes}

    def _row(self, index: int, volume: np.ndarray) -> dict[str, np.ndarray]:
        record = self.data.read(index, volume)
        return self._text(record) | {
            "labels": record.labels.astype(np.int8),
            "patient_id": short_id(record.patient),
            "valid": np.bool_(True),
            "record_index": np.int32(index),
        }

    def _text(self, record: Record) -> dict[str, np.ndarray]:
        if record.report_id not in self._tokens:
            fields = self.tokenizer(record.sentences)
            self._tokens[record.report_id] = fields | {"report_id": short_id(record.report_id)}
        return self._tokens[record.report_id]


class LocalBatches:
    """Random access to this process's rows of the batches `start ... stop - 1`: what grain reads from."""

    def __init__(self, reader: BatchReader, rows: range, batch_size: int, *, seed: int, start: int, stop: int,
                 shuffle_reports: bool = False):  # fmt: skip
        self.reader, self.rows, self.batch_size, self.start, self.stop = reader, rows, batch_size, start, stop
        records = len(reader.data)
        self.order = grain.MapDataset.range(records).shuffle(seed=seed).repeat()
        # The control experiment: a fixed permutation of the reports over the volumes.
        self.report_of = np.random.default_rng(seed).permutation(records) if shuffle_reports else None

    def __len__(self) -> int:
        return self.stop - self.start

    def __getitem__(self, i: int) -> dict[str, np.ndarray]:
        first = (self.start + i) * self.batch_size
        indices = [int(self.order[first + row]) for row in self.rows]
        return self.reader(indices, None if self.report_of is None else [int(self.report_of[j]) for j in indices])


def train_batches(
    data: PreparedData, tokenizer: ReportTokenizer, config: ConfigDict, mesh: Mesh, *, start: int, stop: int
) -> Iterator[dict]:
    """Global batches of steps `start ... stop - 1`, as sharded arrays. Read ahead in threads, or in `workers` processes."""
    size = config.data.batch_size
    if size % (sharding.batch_shards(mesh) * config.optimizer.accumulation):
        parts = sharding.batch_shards(mesh) * config.optimizer.accumulation
        raise UserError(
            f"data.batch_size = {size} is not divisible by the mesh's data * fsdp * accumulation = {parts}: "
            f"use a multiple of {parts}"
        )
    rows = sharding.local_rows(mesh, size)
    source = LocalBatches(
        BatchReader(data, tokenizer), rows, size, seed=config.seed, start=start, stop=stop,
        shuffle_reports=config.data.shuffle_reports,
    )  # fmt: skip
    # The elements are whole batches: threads and workers take turns by them, so the order stays.
    batches = grain.MapDataset.source(source)
    threads = config.data.read_threads
    options = grain.ReadOptions(
        num_threads=threads, prefetch_buffer_size=max(PREFETCHED_BATCHES, threads) if threads else 0
    )
    dataset = batches.to_iter_dataset(options)
    if config.data.workers:
        from absl import flags

        if not flags.FLAGS.is_parsed():  # grain's workers read absl flags
            flags.FLAGS.mark_as_parsed()
        dataset = dataset.mp_prefetch(grain.MultiprocessingOptions(num_workers=config.data.workers))
    iterator = iter(dataset)
    try:
        for local in iterator:
            yield sharding.to_global(local, mesh, size)
    finally:
        if hasattr(iterator, "close"):
            iterator.close()


def evaluation_batches(data: PreparedData, tokenizer: ReportTokenizer, mesh: Mesh, batch_size: int) -> Iterator[dict]:
    """Every record once, in order; the last batch is padded with `valid = False` rows."""
    rows, reader = sharding.local_rows(mesh, batch_size), BatchReader(data, tokenizer)
    for first in range(0, len(data), batch_size):
        positions = np.array([first + row for row in rows])
        local = reader([min(int(p), len(data) - 1) for p in positions]) | {"valid": positions < len(data)}
        yield sharding.to_global(local, mesh, batch_size)

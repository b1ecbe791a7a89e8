"""Prepared records -> grain -> host batches -> global arrays on the mesh.

The data position is one integer, the step: batch N holds positions `N * B ... (N + 1) * B - 1` of an endless, seeded,
per-epoch shuffled order of the records, whatever the number of processes, workers or devices. Each process reads only
the rows that lie on its own devices; starting at step N means building the iterator there, nothing is replayed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import grain
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from mg3d_jax import batch as batch_contract
from mg3d_jax import sharding
from mg3d_jax.data.records import Record, RecordReader, decode
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

    def __init__(self, folders: tuple[str, ...], *, max_patients: int = 0, volume_size: tuple[int, int, int] | None = None):
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
            raise UserError(f"data.max_patients = {max_patients}, but there are only {max(map(len, counts))} patients in {folders}")
        self.patients = sum(map(len, counts))
        self.lengths = [sum(n for _, n in c) for c in counts]
        self.report_tokenizer: ReportTokenizer | None = None

    def __len__(self) -> int:
        return sum(self.lengths)

    def __getitem__(self, index: int) -> bytes:
        for reader, length in zip(self.readers, self.lengths, strict=True):
            if index < length:
                return reader.read_bytes(index)
            index -= length
        raise IndexError(index)

    def records(self) -> Iterator[Record]:
        """All records in order, decoded."""
        return (decode(self[i]) for i in range(len(self)))


def short_id(text: str) -> np.int32:
    """A stable non-negative 31-bit id. Two different texts collide with probability 2^-31, and then are only not negatives."""
    return np.int32(int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") >> 1)


class Example:
    """(position, record bytes) -> one row of the batch. Token arrays are cached by report: they never change."""

    def __init__(self, tokenizer: ReportTokenizer):
        self.tokenizer = tokenizer
        self._tokens: dict[str, dict[str, np.ndarray]] = {}

    def __call__(self, index: int, data: bytes, report_from: bytes | None = None) -> dict[str, np.ndarray]:
        record = decode(data)
        report = record if report_from is None else decode(report_from)
        if report.report_id not in self._tokens:
            self._tokens[report.report_id] = self.tokenizer(report.sentences)
        return self._tokens[report.report_id] | {
            "volume": record.volume,
            "labels": record.labels.astype(np.int8),
            "report_id": short_id(report.report_id),
            "patient_id": short_id(record.patient),
            "valid": np.bool_(True),
            "record_index": np.int32(index),
        }


class _LocalRows:
    """Random access to this process's rows, in the order it consumes them: row i is row `i % L` of batch `start + i // L`."""

    def __init__(self, data: PreparedData, example: Example, rows: range, batch_size: int, seed: int, start: int, stop: int,
                 shuffle_reports: bool):  # fmt: skip
        self.data, self.example, self.rows, self.batch_size = data, example, rows, batch_size
        self.start, self.stop = start, stop
        self.order = grain.MapDataset.range(len(data)).shuffle(seed=seed).repeat()
        # The control experiment: a fixed derangement-like permutation of the reports over the volumes.
        self.report_of = np.random.default_rng(seed).permutation(len(data)) if shuffle_reports else None

    def __len__(self) -> int:
        return (self.stop - self.start) * len(self.rows)

    def __getitem__(self, i: int) -> dict[str, np.ndarray]:
        step, row = self.start + i // len(self.rows), self.rows[i % len(self.rows)]
        index = int(self.order[step * self.batch_size + row])
        other = None if self.report_of is None else self.data[int(self.report_of[index])]
        return self.example(index, self.data[index], other)


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
    source = _LocalRows(data, Example(tokenizer), rows, size, config.seed, start, stop, config.data.shuffle_reports)
    # Batched before it is split over threads and workers: they take turns by whole batches, so the order stays.
    batches = grain.MapDataset.source(source).batch(len(rows), drop_remainder=True)
    threads = config.data.read_threads
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=max(PREFETCHED_BATCHES, threads) if threads else 0)
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
    rows, example = sharding.local_rows(mesh, batch_size), Example(tokenizer)
    for first in range(0, len(data), batch_size):
        examples = []
        for row in rows:
            index = min(first + row, len(data) - 1)
            examples.append(example(index, data[index]) | {"valid": np.bool_(first + row < len(data))})
        local = {name: np.stack([e[name] for e in examples]) for name in batch_contract.FIELDS}
        yield sharding.to_global(local, mesh, batch_size)

"""The further texts of reports that objectives read, and, for a frozen report encoder, their features, computed once.

With `model.report_encoder.precompute` every distinct sentence of the training and held-out reports, and every statement
that an objective makes of one, is encoded before the first step; batches then carry features in place of token ids. The
features are kept in the run's folder, so that a resumed run computes only what is new, or in one that several runs share
(`model.report_encoder.features`).
"""

from __future__ import annotations

import functools
import hashlib
import io
import json
import logging
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import jax
import numpy as np

from mg3d_jax import sharding
from mg3d_jax.data.pipeline import MoreText, PreparedData
from mg3d_jax.data.shard_reader import DamagedRecordError
from mg3d_jax.data.tokens import ReportTokenizer
from mg3d_jax.files import write_bytes
from mg3d_jax.objectives.base import Context, text_maker
from mg3d_jax.options import Group
from mg3d_jax.progress import Progress
from mg3d_jax.training import distributed, integrity
from mg3d_jax.training.state import Setup

logger = logging.getLogger(__name__)
FILE = "text_features.npz"  # of a run's folder
SHARED_FILE = "text_features-{}.npz"  # by the weights that they come from
TEXTS_PER_CALL = 64  # of all devices together
LENGTH_STEP = 8  # texts are padded to a multiple of it, so that few programs are compiled


def report_texts(
    setup: Setup,
    params: Any,
    tokenizer: ReportTokenizer,
    data: Sequence[PreparedData],
    folder: Path | None = None,
) -> MoreText:
    """`sentences of a report -> the fields that the run's objectives add to a batch`.

    Args:
        params: with the weights of the frozen report encoder, where features are precomputed.
        data: whose reports will be asked for; those of others fail then.
        folder: of the run, where features are kept unless the config names another place; None keeps none there.
    """
    config = setup.config
    context = Context(config.data, config.model, tokenizer.vocab_size, Group({}))
    make = functools.partial(text_maker, setup.model.on, tokenizer.encode, context)
    if not config.model.report_encoder.precompute:
        return make()
    features = TextFeatures(config.model.report_encoder.sizes.width)
    wanted = _texts_of(data, make)
    mark, path = _fingerprint(params), None
    if shared := config.model.report_encoder.features:
        path = Path(shared) / SHARED_FILE.format(mark)
    elif folder is not None:
        path = folder / FILE
    if path:
        features.load(path, mark)
        if not _same_on_all_processes(features.missing(wanted)):  # another run has just written the file
            features = TextFeatures(features.width)
    if missing := features.missing(wanted):
        features.add(missing, _encoded(setup, params, missing))
        if path and jax.process_index() == 0:
            features.save(path, mark)
    return make(features)


class TextFeatures:
    """Features of texts, float16 [e] each, by their token ids: `features(ids [..., L]) -> [..., e]`; zeros for no text."""

    def __init__(self, width: int):
        self.width = width
        self._rows: dict[bytes, int] = {}
        self._table = np.zeros((0, width), np.float16)

    def __call__(self, ids: np.ndarray) -> np.ndarray:
        flat = ids.reshape(-1, ids.shape[-1])
        found = np.zeros((len(flat), self.width), np.float16)
        for number, row in enumerate(flat):
            if row.any():
                found[number] = self._table[self._rows[_name(row)]]
        return found.reshape(*ids.shape[:-1], self.width)

    def missing(self, texts: Iterable[bytes]) -> list[bytes]:
        """Those of the texts that are not there, sorted: the same on every process."""
        return sorted(set(texts) - self._rows.keys())

    def add(self, texts: Sequence[bytes], table: np.ndarray) -> None:
        """Adds a row of the table [n, e] for each text."""
        self._rows |= {text: len(self._rows) + number for number, text in enumerate(texts)}
        self._table = np.concatenate([self._table, table.astype(np.float16)])

    def save(self, path: Path, mark: str) -> None:
        """Writes all, with the `mark` of the weights that they come from. Makes the folder. Of several runs that write one file
        at a time the last one's remains, whole: what the others had is computed again by who needs it."""
        path.parent.mkdir(parents=True, exist_ok=True)
        lengths = np.array([len(text) for text in self._rows], np.int64)
        content = io.BytesIO()
        np.savez(
            content, mark=mark, texts=np.frombuffer(b"".join(self._rows), np.uint8), lengths=lengths, table=self._table
        )
        write_bytes(path, content.getvalue(), durable=False)

    def load(self, path: Path, mark: str) -> None:
        """Reads what `save` wrote. A file that is not there, not whole or of other weights is passed over, and named."""
        if not path.is_file():
            return
        with suppress(OSError, ValueError, KeyError, EOFError), np.load(path) as stored:
            if str(stored["mark"]) == mark and stored["table"].shape[1] == self.width:
                ends = np.cumsum(stored["lengths"])
                content = stored["texts"].tobytes()
                texts = [content[start:end] for start, end in zip([0, *ends[:-1]], ends, strict=True)]
                self.add(texts, stored["table"])
                return
        logger.warning("%s: holds no features of this run's report encoder: they are computed again", path)


def _same_on_all_processes(texts: Sequence[bytes]) -> bool:
    return len(set(distributed.gather_texts("features", hashlib.sha256(b"".join(texts)).hexdigest()))) == 1


def _name(ids: np.ndarray) -> bytes:
    """The ids of a text without the padding, as bytes."""
    return ids[: np.flatnonzero(ids)[-1] + 1].astype(np.int32).tobytes()


def _texts_of(data: Sequence[PreparedData], make: Callable[..., MoreText]) -> set[bytes]:
    """All texts that the reports of `data` give."""
    texts: set[bytes] = set()

    def note(ids: np.ndarray) -> np.ndarray:
        texts.update(_name(row) for row in ids.reshape(-1, ids.shape[-1]) if row.any())
        return ids

    maker, seen = make(note), set()
    for one in data:
        for index in range(len(one)):
            with suppress(DamagedRecordError):  # training names what it meets
                text = one.text(index)
                if text.report_id not in seen:
                    seen.add(text.report_id)
                    maker(text.sentences)
    return texts


def _encoded(setup: Setup, params: Any, texts: Sequence[bytes]) -> np.ndarray:
    """Features [n, e] of the texts, in their order."""
    ids = [np.frombuffer(text, np.int32) for text in texts]
    size = -(-TEXTS_PER_CALL // sharding.batch_shards(setup.mesh)) * sharding.batch_shards(setup.mesh)
    local = np.array(sharding.local_rows(setup.mesh, size))
    program = jax.jit(
        lambda p, batch: setup.model.apply({"params": p}, batch, method="sentence_features")[0],
        in_shardings=(setup.shardings["params"], sharding.batch_sharding(setup.mesh)),
        out_shardings=sharding.replicated(setup.mesh),
    )
    order = sorted(range(len(ids)), key=lambda number: len(ids[number]))
    found: np.ndarray | None = None
    with Progress("encode sentences", total=len(ids), unit="texts") as progress:
        for first in range(0, len(order), size):
            numbers = order[first : first + size]
            rows = [ids[numbers[min(row, len(numbers) - 1)]] for row in local]
            length = -(-max(len(ids[number]) for number in numbers) // LENGTH_STEP) * LENGTH_STEP
            batch = sharding.to_global(_padded(rows, length), setup.mesh, size)
            with sharding.in_mesh(setup.mesh):
                features = np.asarray(jax.device_get(program(params, batch)), np.float32)[: len(numbers)]
            if found is None:
                found = np.empty((len(ids), features.shape[1]), np.float32)
            found[numbers] = features
            progress.advance(len(numbers))
    assert found is not None
    return found


def _padded(rows: Sequence[np.ndarray], length: int) -> dict[str, np.ndarray]:
    """Texts [CLS] ... [SEP] as the arrays that the report encoder reads, [n, length]."""
    count, place = np.array([len(row) for row in rows])[:, None], np.arange(length)
    ids = np.stack([np.pad(row, (0, length - len(row)), mode="edge") for row in rows])
    return {
        "token_ids": ids.astype(np.int32),  # what fills up is masked
        "token_mask": place < count,
        "sentence_index": ((place >= 1) & (place < count - 1)).astype(np.int32),
    }


def _fingerprint(params: Any) -> str:
    """A short text that differs between report encoders with different weights; the same on every mesh and machine."""
    sums = integrity.checksums(params["report_encoder"])
    return hashlib.sha256(json.dumps(sums, sort_keys=True).encode()).hexdigest()[:16]

"""Lets the report decoder of a run write, for every volume of prepared data, on any mesh."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from mg3d_jax.evaluation.base import Text
from mg3d_jax.prepare.cleaning import readable
from mg3d_jax.prepare.reports import split_sentences

if TYPE_CHECKING:
    from mg3d_jax.data.pipeline import PreparedData
    from mg3d_jax.evaluation.embed import Embedder
    from mg3d_jax.models.sampling import Sampling
    from mg3d_jax.progress import Progress

DECODER = "report_decoder"  # among the parameters of a run that can write


@dataclass(frozen=True)
class WrittenReports:
    """What was written for n volumes, in the order of the data, and what is known of them."""

    texts: tuple[str, ...]
    ended: np.ndarray  # bool [n]: False where the limit of tokens cut the text
    tokens: np.ndarray  # int [n], the one that ends the text included
    rows: np.ndarray  # int [n]: places in the data
    labels: np.ndarray  # int8 [n, L]
    pooled: np.ndarray  # float32 [n, d]: mean of the volume's tokens

    @property
    def sentences(self) -> list[Text]:
        """The texts, sentence by sentence."""
        return [split_sentences(text) for text in self.texts]


def sampling_of(embedder: Embedder, settings: Any) -> Sampling:
    """How the options of `evaluation.generation` let a run's decoder write."""
    from mg3d_jax.models.sampling import Sampling

    special, longest = embedder.tokenizer.special, embedder.config.data.max_tokens - 1
    return Sampling(
        settings.method,
        max_tokens=min(settings.max_tokens or longest, longest),
        start=special["[CLS]"],
        end=special["[SEP]"],
        pad=special["[PAD]"],
        forbidden=tuple(special[name] for name in ("[PAD]", "[CLS]", "[MASK]", "[UNK]")),
        temperature=settings.temperature,
        top_p=settings.top_p,
        beams=settings.beams,
        length_penalty=settings.length_penalty,
        no_repeat=settings.no_repeat,
    )


class ReportWriter:
    """`(params, data) -> WrittenReports`; compiled once.

    A report depends on its volume, the options and, with nucleus sampling, on the seed and the place of the record alone:
    not on the batch. All processes of a run must call it.
    """

    def __init__(self, embedder: Embedder, sampling: Sampling, seed: int = 0):
        self._embedder, self._sampling, self._seed = embedder, sampling, seed
        self._program = embedder.compiled(self._write)
        self._pool = embedder.compiled(self._pooled)

    def __call__(
        self, params: Any, data: PreparedData, *, most: int = 0, progress: Progress | None = None, **bad_records: Any
    ) -> WrittenReports:
        """Writes for all volumes, or the first `most`.

        Args:
            bad_records: as for `Embedder.volumes`.
        """
        found = self._walk(self._program, params, data, most, progress=progress, **bad_records)
        decode = self._embedder.tokenizer.tokenizer.decode
        ids = [row[:length].tolist() for row, length in zip(found["tokens"], found["length"], strict=True)]
        texts = tuple(readable(decode(one, skip_special_tokens=True)) for one in ids)
        return WrittenReports(
            texts, found["ended"], found["length"], found["record_index"], found["labels"], found["pooled"]
        )

    def pooled(
        self, params: Any, data: PreparedData, most: int = 0, progress: Progress | None = None
    ) -> dict[str, np.ndarray]:
        """`pooled` float32 [n, d], the mean of a volume's tokens, `labels` and `record_index` of the volumes, or the first
        `most`."""
        return self._walk(self._pool, params, data, most, progress=progress)

    def _walk(
        self, program: Any, params: Any, data: PreparedData, most: int, **bad_records: Any
    ) -> dict[str, np.ndarray]:
        parts, count = [], 0
        for part in self._embedder.walk(program, params, data, **bad_records):
            parts.append(part)
            count += len(part["record_index"])
            if 0 < most <= count:
                break
        return {name: np.concatenate([part[name] for part in parts])[: most or None] for name in parts[0]}

    def _pooled(self, params: Any, batch: Mapping[str, Any]) -> dict[str, Any]:
        import jax.numpy as jnp

        model = self._embedder.setup.model
        inputs = {"volume": self._windowed(batch)}
        tokens = model.apply({"params": params}, inputs, ("volume_tokens",), method="compute")["volume_tokens"]
        return {"pooled": tokens.astype(jnp.float32).mean(axis=1)} | _passed_through(batch)

    def _write(self, params: Any, batch: Mapping[str, Any]) -> dict[str, Any]:
        import functools

        import jax

        from mg3d_jax.models import sampling

        options, apply = self._sampling, self._embedder.setup.model.apply
        step = functools.partial(apply, {"params": params}, method="report_step")
        volume = self._windowed(batch)
        cache = apply({"params": params}, volume, options.texts, options.max_tokens, method="start_report")
        keys = jax.vmap(lambda row: jax.random.fold_in(jax.random.key(self._seed), row))(batch["record_index"])
        written = sampling.write(step, cache, volume.shape[0], options, keys, sampling.beam_reorder)
        return written | self._pooled(params, batch)

    def _windowed(self, batch: Mapping[str, Any]) -> Any:
        from mg3d_jax.training import inputs

        return inputs.window(batch["volume"], self._embedder.config.data.windows)


def _passed_through(batch: Mapping[str, Any]) -> dict[str, Any]:
    return {name: array for name, array in batch.items() if name != "volume"}

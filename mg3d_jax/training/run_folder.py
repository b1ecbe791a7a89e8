"""What lies in the folder of a run beside checkpoints and metrics: config, tokenizer, summary, and the notes on faults."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import jax
from tokenizers import Tokenizer

from mg3d_jax.config import Config
from mg3d_jax.data.pipeline import PreparedData, skipped_records
from mg3d_jax.data.shard_reader import DamagedRecordError
from mg3d_jax.data.tokens import ReportTokenizer, load_tokenizer, save_tokenizer, train_wordpiece
from mg3d_jax.training import distributed
from mg3d_jax.training.checkpoints import Checkpoints

CONFIG_FILE, TOKENIZER_FOLDER = "config.json", "tokenizer"
SUMMARY_FILE, ENVIRONMENT_FILE = "summary.json", "environment.json"
TOKENIZER_RECORDS = 2000


def run_tokenizer(config: Config, workdir: Path) -> ReportTokenizer:
    """The tokenizer that the run keeps: made before it has a checkpoint, and only read afterwards.

    A start that came to no checkpoint may have been one with another `data.tokenizer` or `data.vocab_size`.
    A trained one reads the first 2,000 records of the whole training set, not of the `max_patients` subset: the runs of a
    sweep over data size share their vocabulary.
    """
    folder = workdir / TOKENIZER_FOLDER
    kept = (folder / "tokenizer.json").exists() and Checkpoints(workdir).latest() is not None
    if jax.process_index() == 0 and not kept:
        # Made elsewhere and renamed: a kill in the middle leaves no half a tokenizer.
        partial = workdir / f"{TOKENIZER_FOLDER}.partial"
        save_tokenizer(_make_tokenizer(config, workdir), partial)
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(partial, folder)
    distributed.barrier("tokenizer")  # the others read what process 0 wrote
    return ReportTokenizer(load_tokenizer(str(folder)), config.data.max_tokens, config.data.max_sentences)


def _make_tokenizer(config: Config, workdir: Path) -> Tokenizer:
    if config.data.tokenizer != "train":
        return load_tokenizer(config.data.tokenizer)
    data, sentences = PreparedData(config.data.train), set()
    bad = skipped_records(data, workdir, config.data.max_bad_records)
    for index in range(min(len(data), TOKENIZER_RECORDS)):
        try:
            sentences.update(data.text(index)[1])
        except DamagedRecordError as error:
            data.note(index, bad, error)
    return train_wordpiece(sentences, config.data.vocab_size)

"""What lies in the folder of a run beside checkpoints and metrics: config, tokenizer, summary, and the notes on faults."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jax

from mg3d_jax import __version__, version
from mg3d_jax import config as config_lib
from mg3d_jax.config import Config
from mg3d_jax.config.parts import DataConfig
from mg3d_jax.data.order import RecordOrder
from mg3d_jax.data.pipeline import PreparedData, record_names, tokenizer_sentences
from mg3d_jax.data.tokens import ReportTokenizer, load_tokenizer, save_tokenizer, train_wordpiece
from mg3d_jax.environment import environment_facts
from mg3d_jax.errors import UserError
from mg3d_jax.files import write_json
from mg3d_jax.flops import Flops
from mg3d_jax.training import distributed
from mg3d_jax.training.checkpoints import Checkpoints

CONFIG_FILE, TOKENIZER_FOLDER = "config.json", "tokenizer"
SUMMARY_FILE, ENVIRONMENT_FILE = "summary.json", "environment.json"


def make_tokenizer(options: DataConfig, workdir: Path) -> None:
    """Writes the tokenizer that the run keeps, in process 0, unless the run has a checkpoint: it is only read then.

    A start that came to no checkpoint may have been one with another `data.tokenizer` or `data.vocab_size`.
    """
    folder = workdir / TOKENIZER_FOLDER
    kept = (folder / "tokenizer.json").exists() and Checkpoints(workdir).latest() is not None
    if jax.process_index() != 0 or kept:
        return
    if options.tokenizer == "train":
        made = train_wordpiece(tokenizer_sentences(options, log_folder=workdir), options.vocab_size)
    else:
        made = load_tokenizer(options.tokenizer)
    # Written elsewhere and renamed: a kill in the middle leaves no half a tokenizer.
    partial = workdir / f"{TOKENIZER_FOLDER}.partial"
    save_tokenizer(made, partial)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(partial, folder)


def read_tokenizer(options: DataConfig, workdir: Path) -> ReportTokenizer:
    """The tokenizer that `make_tokenizer` has written."""
    kept = load_tokenizer(str(workdir / TOKENIZER_FOLDER))
    return ReportTokenizer(kept, options.max_tokens, options.max_sentences)


def check_processes_agree(
    config: Config, data: PreparedData, valid: PreparedData | None, tokenizer: ReportTokenizer
) -> None:
    """`UserError`, in all processes, where one runs another configuration, code, package, tokenizer or other data."""
    if jax.process_count() == 1:
        return
    environment = environment_facts()
    facts = {key: repr(value) for key, value in config_lib.relevant(config).items()}
    facts |= {f"the package {name}": value for name, value in environment["packages"].items()}
    facts |= {"mg3d_jax": environment["mg3d_jax"], "the commit of mg3d_jax": environment["commit"]}
    facts["the tokenizer"] = _digest(tokenizer.tokenizer.to_str())
    for name, one in (("data.train", data), ("data.valid", valid)):
        facts[f"the records of {name}"] = _digest(repr(one.contents() if one else ()))
    distributed.check_agreement("same", facts)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def identity(config: Config) -> dict[str, Any]:
    """Which configuration and which code: in every checkpoint and in the summary."""
    return {"config_hash": config_lib.config_hash(config), "code_version": __version__, "code": version.code()}


def facts(config: Config, vocab_size: int, data: PreparedData, flops: Flops) -> dict[str, Any]:
    """The part of a checkpoint's JSON that is the same at every step of a run."""
    return identity(config) | {
        "config": config_lib.to_json(config),
        "vocab_size": vocab_size,
        "flops": asdict(flops),  # of one patient; a resume need not trace the model to count them
        "records": data.lengths,  # of each folder: they make the order of the samples
        "content": data.contents(),  # of each folder: what the records hold
        "spacing": data.spacing,  # mm, None if it differs between volumes; exports say it to their users
        "label_names": data.label_names,  # of a classification head
        "source": " + ".join(sorted({reader.manifest["source"] for reader in data.readers})),
        "settings": shared_settings([reader.manifest.get("settings") or {} for reader in data.readers]),
    }


PLACEMENT = ("policy", "fraction", "window", "modality")


def shared_settings(settings: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """How the volumes of all folders were brought to the grid, for scans that come later; "mixed" lists what differs."""
    found = {key: {json.dumps(one.get(key)) for one in settings} for key in PLACEMENT}
    common = {key: json.loads(*values) for key, values in found.items() if len(values) == 1}
    return common | {"mixed": sorted(found.keys() - common.keys())}


def check_same_records(meta: Mapping[str, Any], data: PreparedData) -> None:
    """`UserError` where a resumed run finds other records than its checkpoint was made with: what changed, and the snapshot
    of a folder that has grown since (`mg3d prepare` keeps one) on which the run goes on."""
    lengths, contents = meta.get("records", data.lengths), meta.get("content", data.contents())
    if lengths == data.lengths and contents == data.contents():
        return
    changes, instead = [], []
    for number, reader in enumerate(data.readers):
        before = lengths[number] if number < len(lengths) else 0
        if number < len(contents) and contents[number] == reader.content() and before == data.lengths[number]:
            instead.append(str(reader.folder))
            continue
        found = reader.snapshot_with(before, contents[number] if number < len(contents) and "content" in meta else None)
        instead.append(str(found) if found else "")
        changes.append(
            f"{reader.folder} had {before} records and has {data.lengths[number]} now{reader.changes_since(found)}"
        )
    remedy = "Use the same data, or another --workdir."
    if instead and all(instead):
        remedy = f"The run goes on, on the state that it began with, with --config.data.train={','.join(instead)}"
    raise UserError(
        f"this run was started on folders of {lengths} records, those of data.train have {data.lengths}: their "
        f"order would be another one. {'; '.join(changes)}. {remedy}"
    )


def records_of_steps(data: PreparedData, options: DataConfig, seed: int) -> Callable[[int], list[str]]:
    """`step -> names of the records in its batch`."""
    order, size = RecordOrder(data.lengths, options.weights, seed=seed), options.batch_size

    def names(step: int) -> list[str]:
        return record_names(data, [order[position] for position in range((step - 1) * size, step * size)])

    return names


def write_start(workdir: Path, config: Config) -> None:
    """What a run says about itself before its first step. The summary of an end whose checkpoint is gone goes."""
    if jax.process_index() == 0:
        (workdir / SUMMARY_FILE).unlink(missing_ok=True)
        write_json(workdir / CONFIG_FILE, config_lib.to_dict(config), allow_nan=True)
        write_json(workdir / ENVIRONMENT_FILE, environment_facts())


def lacks_summary(workdir: Path) -> bool:
    """Has a kill come between the last checkpoint and the summary?"""
    return not (workdir / SUMMARY_FILE).exists()


def write_summary(
    workdir: Path,
    config: Config,
    data: PreparedData,
    *,
    steps: int,
    final: Mapping[str, float],
    parameters: Mapping[str, int],
    flops_per_step: float,
    trained_seconds: float,
) -> None:
    """`summary.json`: what sweeps and reports read when the run is done. `final`: what was measured after the last step."""
    if jax.process_index() != 0:
        return
    summary = {
        "state": "done",
        "step": steps,
        "samples_seen": steps * config.data.batch_size,
        "unique_patients": data.patients,
        "unique_records": len(data),
        "final": final,
        "parameters": parameters,
        "flops_per_step": flops_per_step,
        "trained_seconds": trained_seconds,
        "devices": jax.device_count(),
    }
    write_json(workdir / SUMMARY_FILE, summary | identity(config), allow_nan=True)

"""Reads what lies in the folder of a run, finished or not: whatever is not there yet is simply absent."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mg3d_jax import config as config_lib
from mg3d_jax.config import Config
from mg3d_jax.data.bad_records import BAD_RECORDS_NAME
from mg3d_jax.errors import UserError
from mg3d_jax.files import read_json, read_lines
from mg3d_jax.training.run_folder import CONFIG_FILE, ENVIRONMENT_FILE, SUMMARY_FILE
from mg3d_jax.training.stopping import SKIPPED_FILE
from mg3d_jax.training.writers import IMAGES_FOLDER, METRICS_FILE

EVALUATION_FILE = Path("evaluation") / "evaluation.json"
ATTENTION_FOLDER = "attention"  # `mg3d attend --out RUN/attention/NAME`


@dataclass(frozen=True)
class RunFiles:
    """What a run has written. `metrics` are the lines of metrics.jsonl, `damaged` how many of them could not be read.

    `images` are `{name: {step: file}}`, `attention` the overlays of `mg3d attend` by the name of their folder.
    """

    folder: Path
    config: Config | None
    metrics: list[dict[str, Any]]
    damaged: int
    summary: dict[str, Any]
    checkpoint: dict[str, Any]  # the JSON of the newest checkpoint, without its config
    environment: dict[str, Any]
    evaluation: dict[str, Any]
    skipped: list[dict[str, Any]]
    bad_records: list[dict[str, Any]]
    images: dict[str, dict[int, Path]]
    attention: dict[str, Path]

    def last(self, name: str, default: Any = None) -> Any:
        """The newest value of a training metric or, where a run has none, of the newest checkpoint's JSON."""
        trained = (line for line in reversed(self.metrics) if line.get("split", "train") == "train")
        found = next((line[name] for line in trained if name in line), None)
        return self.checkpoint.get(name, default) if found is None else found


def read_run(folder: Path) -> RunFiles:
    """`UserError` where `folder` is no run, or a file of it cannot be read."""
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder: give the --workdir of an `mg3d train`")
    if not (folder / CONFIG_FILE).exists() and not (folder / METRICS_FILE).exists():
        raise UserError(f"{folder} is not a run: it has neither {CONFIG_FILE} nor {METRICS_FILE}")
    metrics, damaged = read_lines(folder / METRICS_FILE)
    return RunFiles(
        folder=folder,
        config=_config(folder / CONFIG_FILE),
        metrics=[line for line in metrics if isinstance(line.get("step"), int)],
        damaged=damaged,
        summary=_document(folder / SUMMARY_FILE),
        checkpoint=_newest_checkpoint(folder / "checkpoints"),
        environment=_document(folder / ENVIRONMENT_FILE),
        evaluation=_document(folder / EVALUATION_FILE),
        skipped=read_lines(folder / SKIPPED_FILE)[0],
        bad_records=read_lines(folder / BAD_RECORDS_NAME)[0],
        images=_images(folder / IMAGES_FOLDER),
        attention={
            str(path.relative_to(folder / ATTENTION_FOLDER).with_suffix("")): path
            for path in sorted((folder / ATTENTION_FOLDER).rglob("*.png"))
        },
    )


def _document(path: Path) -> dict[str, Any]:
    return read_json(path, remedy="restore it, or remove it to do without") if path.exists() else {}


def _config(path: Path) -> Config | None:
    return config_lib.from_json(path.read_text()) if _document(path) else None


def _newest_checkpoint(folder: Path) -> dict[str, Any]:
    """The JSON part of the newest checkpoint, read as a file: opening orbax's manager might disturb a run in progress."""
    steps = sorted((int(p.name) for p in folder.glob("*") if p.name.isdecimal()), reverse=True)
    for step in steps:
        try:
            meta = json.loads((folder / str(step) / "meta" / "metadata").read_text())
        except (OSError, ValueError):  # being written, or damaged
            continue
        return {key: value for key, value in meta.items() if key != "config"}
    return {}


def _images(folder: Path) -> dict[str, dict[int, Path]]:
    found: dict[str, dict[int, Path]] = defaultdict(dict)
    for path in sorted(folder.glob("*.png")):
        if match := re.fullmatch(r"(.+)-(\d+)", path.stem):
            found[match[1]][int(match[2])] = path
    return {name: dict(sorted(by_step.items())) for name, by_step in sorted(found.items())}

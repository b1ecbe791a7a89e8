"""What finished runs leave: `record.json` of each, and the rows that the fit reads, one per declared run."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mg3d_jax import config as config_lib
from mg3d_jax.config import Config
from mg3d_jax.files import read_json, whole_lines, write_json
from mg3d_jax.scaling.fit import table
from mg3d_jax.scaling.fit.table import Row
from mg3d_jax.scaling.sweep import rate_check, states
from mg3d_jax.scaling.sweep.declaration import Run, Sweep
from mg3d_jax.training import cost as step_cost

RECORD_FILE = "record.json"
# What must be equal for losses to be comparable: the schedule (a run must end where its decay ends), the number of
# negatives of the contrastive loss, what the two towers are shown, and what the losses are of.
COMPARABLE = (
    "schedule.kind",
    "schedule.cooldown_percent",
    "schedule.final_fraction",
    "data.batch_size",
    "data.windows",
    "data.shuffle_reports",
    "model.volume_size",
    "objectives.alignment.temperature",
    "objectives.alignment.learn_temperature",
    "objectives.alignment.report_view",
    "objectives.alignment.report_sentences",
    "objectives.alignment.sentence_tokens",
    "objectives.alignment.form",
    "objectives.alignment.center",
    "objectives.volume_reconstruction.mask_ratio",
    "objectives.volume_reconstruction.masking",
    "objectives.volume_reconstruction.normalize_target",
    "objectives.volume_reconstruction.read_report",
    "objectives.report_reconstruction.mask_ratio",
    "objectives.report_reconstruction.sentence_weight",
    "objectives.matching.high",
    "objectives.matching.low",
    "objectives.matching.average",
    "objectives.matching.sentence_source",
    "objectives.alignment.fused_form",
    "objectives.matching.form",
    "objectives.discrimination.form",
    "model.fusion.other_volumes",
    "objectives.discrimination.temperature",
    "data.max_tokens",
    "data.max_sentences",
    "data.tokenizer",
    "data.vocab_size",
)
WEIGHTED_SUM = "valid/loss"
TESTED = ("seed", "patients", "length", "batch_size", "learning_rate", "schedule", "code_version")
"""Columns of a run that its residual must not depend on, beside its size and its data."""
POOL_LOSS, NEAR_CHANCE = "evaluation/pool_loss", 0.8
NEGATIVES = "negatives of a pair"  # one of them too, though no key of the config
IN_TABLE = (
    "model", "patients", "length", "seed", "subset_seed", "n_total", "n_active", "n_vision", "n_text", "n_heads",
    "unique_patients", "unique_records", "samples_seen", "steps", "training_flops",
    "batch_size", "learning_rate", "schedule", "config_hash", "code_version",
)  # fmt: skip


def write_record(workdir: Path, run: Run) -> dict[str, Any]:
    """Writes `record.json` of a finished run from what its trainer left; returns it."""
    folder = states.run_folder(workdir, run)
    record = build_record(run, read_json(folder / states.SUMMARY_FILE), _evaluations(folder))
    write_json(folder / RECORD_FILE, record)
    return record


def records(workdir: Path, sweep: Sweep) -> list[dict[str, Any]]:
    """The records of the finished runs, as the runner or the last fit wrote them."""
    paths = [states.run_folder(workdir, run) / RECORD_FILE for run in sweep.runs]
    return [read_json(path) for path in paths if path.is_file()]


def build_record(run: Run, summary: dict[str, Any], evaluations: list[dict[str, Any]]) -> dict[str, Any]:
    """The record of a run: identity, sizes, cost, recipe, outcome. FLOPs are counted, not measured (`training.cost`)."""
    config = run.config()
    vocabulary, mismatch = _vocabulary(config, summary)
    cost = step_cost.of_config(config, vocabulary)
    samples, steps = int(summary["samples_seen"]), int(summary["step"])
    seconds = summary.get("trained_seconds")
    return {
        "run": run.id,
        "model": run.model,
        "patients": run.patients,
        "length": run.length,
        "seed": run.seed,
        "subset_seed": run.subset,
        "state": summary["state"],
        "config_hash": summary["config_hash"],
        "code_version": summary["code_version"],
        **asdict(cost.sizes),
        "vocab_size": vocabulary,
        "parameters": summary["parameters"],
        "parameters_mismatch": mismatch,
        "unique_patients": summary["unique_patients"],
        "unique_records": summary["unique_records"],
        "samples_seen": samples,
        "volume_tokens_seen": samples * cost.volume_tokens,
        "report_tokens_seen": samples * cost.report_tokens,
        "training_flops": samples * cost.training.total,
        "training_flops_per_sample": cost.training.total,
        "forward_flops_per_sample": cost.forward.total,
        "steps": steps,
        "trained_seconds": seconds,
        "devices": summary.get("devices"),
        "step_seconds": seconds / steps if seconds and steps else None,
        "batch_size": config.data.batch_size,
        "learning_rate": config.optimizer.learning_rate,
        "schedule": config.schedule.kind,
        "recipe": config_lib.flatten(config),
        "final": {name: value if math.isfinite(value) else None for name, value in summary["final"].items()},
        "evaluations": evaluations,
    }


def _vocabulary(config: Config, summary: dict[str, Any]) -> tuple[int, int]:
    """The tokenizer's size, from the parameters that were built; and by how many parameters our count is then wrong."""
    declared = int(config.data.vocab_size)
    counted = step_cost.of_config(config, declared).sizes.n_total
    excess = int(summary["parameters"]["total"]) - counted
    if not excess:
        return declared, 0
    row = step_cost.of_config(config, declared + 1).sizes.n_total - counted  # parameters per entry of the vocabulary
    rows = round(excess / row)
    return declared + rows, excess - rows * row


def _evaluations(folder: Path) -> list[dict[str, Any]]:
    """Every held-out evaluation of the run: lines of `metrics.jsonl` with split "valid"."""
    finite = (
        {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in one.items()}
        for one in whole_lines(folder / states.METRICS_FILE)
    )
    return [line for line in finite if line.get("split") == "valid"]


def variables_of(sweep: Sweep) -> dict[str, str]:
    """Variables of laws -> where records have them. `U` and `S` count records of data, whatever `D` counts."""
    return {"N": sweep.model_size, "D": sweep.data_size, "U": "unique_records", "S": "samples_seen"}


def rows(workdir: Path, sweep: Sweep, loss: str, variables: Sequence[str] = ("N", "D")) -> list[Row]:
    """A row for every declared run: used, excluded (finished, of no use) or missing (not finished), with the reason."""
    where = {name: variables_of(sweep)[name] for name in variables}
    found = [_row(workdir, run, sweep, loss, where) for run in sweep.runs]
    table.exclude_unusable(found, where | {"loss": loss})
    return found


def _row(workdir: Path, run: Run, sweep: Sweep, loss: str, where: Mapping[str, str]) -> Row:
    status = states.status(workdir, run)
    trunk = Path(run.after).name if run.begins else run.id
    row = Row(run.id, dict.fromkeys(where, math.nan), group=trunk, subset=_subset(run), tested=TESTED)
    row.extra = {"model": run.model, "patients": run.patients, "seed": run.seed, "state": status.state}
    if status.state != states.DONE:
        row.status = table.MISSING
        row.reason = status.state + (f" at step {status.step}" if status.step else "")
        row.reason += f": {status.detail}" if status.detail else ""
        return row
    record = write_record(workdir, run)
    row.sizes = {name: float(record[key]) for name, key in where.items()}
    row.compute = float(record["training_flops"])
    final = record["final"]
    if run.factor != 1:
        row.exclude(f"checks {sweep.checked_key} times {run.factor:g}; not part of the law")
    row.extra |= {key: record[key] for key in IN_TABLE} | final
    if loss not in final:
        row.exclude(f"no metric {loss!r} in {states.SUMMARY_FILE}; it has {', '.join(final) or 'none'}")
    elif record["parameters_mismatch"]:
        row.exclude(
            f"the model has {record['parameters_mismatch']:+,} parameters against our count of its configuration"
        )
    else:
        row.loss = math.nan if final[loss] is None else float(final[loss])
    return row


def _subset(run: Run) -> str:
    """Names the data subset of a run: one for all runs of a data amount, unless subsets have a seed of their own."""
    return f"{run.patients} patients, subset seed {run.subset}"


def objections(sweep: Sweep, found: Sequence[Row], loss: str, *, bounded: bool = False) -> tuple[str | None, list[str]]:
    """Why the used runs must not share a law of the metric `loss`, or None; and what else is to be said of them.

    `bounded`: the law has a chance level.
    """
    checks = rate_check.checks(sweep, found, loss, sweep.model_size)
    refusal = _incomparable(sweep, found, loss) or rate_check.refusal(checks)
    near = [] if bounded else _near_chance(found, loss)
    return refusal, [*_versions(found), *rate_check.warnings(checks), *near]


def _near_chance(found: Sequence[Row], loss: str) -> list[str]:
    """A contrastive loss leaves the logarithm of its pool slowly, as no sum of powers does."""
    if not loss.startswith(POOL_LOSS):
        return []
    used = [(row.loss, row.extra.get(f"{POOL_LOSS}/pool")) for row in table.used(found)]
    chances = {math.log(pool) for _, pool in used if pool}
    if len(chances) != 1:
        return []
    chance = chances.pop()
    count = sum(value > NEAR_CHANCE * chance for value, _ in used)
    said = (
        f"{count} of {len(used)} runs are within {1 - NEAR_CHANCE:.0%} of chance, {chance:.4g}, or above it, where no sum of "
        f"powers holds: fit them with --chance {chance:.6g}"
    )
    return [said] if count else []


def comparable_settings(config: Config) -> dict[str, str]:
    """What must be equal of runs that share a law, by name, as text."""
    flat = config_lib.flatten(config)
    pieces = 1 if flat["optimizer.gradient_cache"] else flat["optimizer.accumulation"]
    flat[NEGATIVES] = flat["data.batch_size"] // pieces - 1
    return {key: repr(flat[key]) for key in (*COMPARABLE, NEGATIVES)}


def _incomparable(sweep: Sweep, found: Sequence[Row], loss: str) -> str | None:
    used = {row.label for row in table.used(found)}
    settings: dict[str, dict[str, None]] = {}  # value -> None: a set that keeps the order
    for run in sweep.runs:
        if run.id in used:
            for key, value in comparable_settings(run.config()).items():
                settings.setdefault(key, {})[value] = None
    mixed = [f"{key} ({', '.join(values)})" for key, values in settings.items() if len(values) > 1]
    if mixed:
        return f"the runs differ in {'; '.join(mixed)}: their losses are not comparable"
    if loss == WEIGHTED_SUM and used and len(terms := _terms(sweep, used)) > 1:
        return (
            f"{loss} is the weighted sum of {', '.join(terms)}, each of which has a law and a floor of its own: fit them "
            f"apart, e.g. --loss valid/{terms[0]}"
        )
    return None


def _terms(sweep: Sweep, used: set[str]) -> list[str]:
    """The objectives that the used runs train, by name."""
    configs = (run.config() for run in sweep.runs if run.id in used)
    return sorted({name for config in configs for name, one in config.objectives.items() if one.weight > 0})


def _versions(found: Sequence[Row]) -> list[str]:
    """A warning where the used runs come from different versions of the code."""
    versions = sorted({str(row.extra["code_version"]) for row in table.used(found)})
    return [f"the runs come from {len(versions)} code versions: {', '.join(versions)}"] if len(versions) > 1 else []

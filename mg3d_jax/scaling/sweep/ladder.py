"""The sizes that a sweep can build, with their counted FLOPs, and what a config would be under its law."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mg3d_jax.config import Config
from mg3d_jax.errors import UserError
from mg3d_jax.files import read_json
from mg3d_jax.scaling.fit.advise import Rung
from mg3d_jax.scaling.sweep import collect, plan, states
from mg3d_jax.scaling.sweep.declaration import Sweep
from mg3d_jax.training import cost as step_cost
from mg3d_jax.training.schedule import total_steps

SAME_RATIO = 0.02  # relative; samples per datum of D of runs of one length may differ by rounding to steps


@dataclass(frozen=True)
class Point:
    """Where a configuration lies: N, D as the sweep counts them, and its training FLOPs."""

    n: float
    d: float
    compute: float


def records(workdir: Path, sweep: Sweep) -> list[dict[str, Any]]:
    """Records of the finished runs. `UserError` where there is none."""
    paths = [states.run_folder(workdir, run) / collect.RECORD_FILE for run in sweep.runs]
    found = [read_json(path) for path in paths if path.is_file()]
    if not found:
        raise UserError(f"{workdir}: no finished run; run the sweep first")
    return found


def flops_per_second(found: Sequence[dict[str, Any]]) -> float:
    """Measured training speed of the finished runs, of the machine that they ran on."""
    seconds = sum(one["trained_seconds"] or 0.0 for one in found)
    if not seconds:
        raise UserError("no finished run says how long it trained: give --compute instead of --device-hours")
    return float(sum(one["training_flops"] for one in found) / seconds)


def samples_per_datum(found: Sequence[dict[str, Any]], sweep: Sweep) -> float:
    """Samples seen per unit of D. `UserError` where it differs between runs: then a budget does not buy D alone."""
    ratios = [one["samples_seen"] / one[sweep.data_size] for one in found]
    if max(ratios) > min(ratios) * (1 + SAME_RATIO) and sweep.data_size != "samples_seen":
        raise UserError(
            f"runs see each of their {sweep.data_size} between {min(ratios):.3g} and {max(ratios):.3g} times, so compute does "
            "not say how much D it buys; declare data_size samples_seen, or a length in epochs"
        )
    return float(sum(ratios) / len(ratios))


def ladder(sweep: Sweep, found: Sequence[dict[str, Any]], more: Sweep | None = None) -> list[Rung]:
    """The models of the sweep, and of another declaration `more`, each once, by size, with FLOPs counted per datum."""
    ratio = samples_per_datum(found, sweep)
    vocabulary = found[0]["vocab_size"]
    rungs: dict[str, Rung] = {}
    for declared in (sweep, *([more] if more else [])):
        for run in declared.runs:
            if run.model not in rungs:
                cost = step_cost.of_config(run.config(), vocabulary)
                n = float(getattr(cost.sizes, sweep.model_size))
                rungs[run.model] = Rung(run.model, n, cost.training.total * ratio)
    return sorted(rungs.values(), key=lambda one: one.n)


def locate(config: Config, sweep: Sweep, vocabulary: int) -> Point:
    """N, D and FLOPs of a training config. `UserError` while its data are not prepared."""
    cost = step_cost.of_config(config, vocabulary)
    patients, count = plan.data_size(config)
    if count is None:
        raise UserError("data.train or data.valid is not a prepared folder (no manifest.json): run mg3d prepare first")
    samples = total_steps(config.training, config.data.batch_size, count) * config.data.batch_size
    d = {"unique_patients": patients, "unique_records": count, "samples_seen": samples}[sweep.data_size]
    return Point(float(getattr(cost.sizes, sweep.model_size)), float(d), float(samples * cost.training.total))

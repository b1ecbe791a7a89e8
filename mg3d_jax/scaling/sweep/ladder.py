"""The sizes that a sweep can build, with their counted FLOPs, and what a config would be under its law."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mg3d_jax import config as config_lib
from mg3d_jax.config import Config
from mg3d_jax.errors import UserError
from mg3d_jax.scaling.fit.advise import Rung
from mg3d_jax.scaling.sweep import collect, plan
from mg3d_jax.scaling.sweep.declaration import Sweep, by_rule
from mg3d_jax.training import cost as step_cost
from mg3d_jax.training.schedule import total_steps

SAME_RATIO = 0.02  # relative; of samples per datum of runs of one length, beside the rounding to steps
SAME_SETTING = 0.01  # relative; of a setting and what the sweep's rule says
SEEN, RECORDS = "samples_seen", "unique_records"


@dataclass(frozen=True)
class Point:
    """Where a configuration lies: the law's variables as the sweep counts them, its training FLOPs, and what to beware of."""

    at: dict[str, float]
    compute: float
    warnings: list[str] = field(default_factory=list)


def samples_per_datum(found: Sequence[Mapping[str, Any]], sweep: Sweep) -> float:
    """Samples seen per unit of D. `UserError` where it differs between runs: then a budget does not buy D alone."""
    ratios = [one[SEEN] / one[sweep.data_size] for one in found]
    if not any(_same_length(found, per) for per in (sweep.data_size, RECORDS)):
        raise UserError(
            f"runs see each of their {sweep.data_size} between {min(ratios):.3g} and {max(ratios):.3g} times, so compute does "
            f"not say how much D it buys; declare data_size {SEEN}, or a length in epochs"
        )
    return float(sum(ratios) / len(ratios))


def _same_length(runs: Sequence[Mapping[str, Any]], per: str) -> bool:
    """Do all runs see each of their `per` ("": their data, all in all) equally often, but for the rounding to whole steps?

    Subsets of as many patients have some more or fewer records: runs of equal epochs are alike by these.
    """
    least = max((one[SEEN] - one["batch_size"]) / (one[per] if per else 1) for one in runs)
    most = min((one[SEEN] + one["batch_size"]) / (one[per] if per else 1) for one in runs)
    return bool(least <= most * (1 + SAME_RATIO))


def ladder(
    sweep: Sweep, found: Sequence[Mapping[str, Any]], more: Sweep | None = None, *, per: str = "D"
) -> list[Rung]:
    """The models of the sweep, and of another declaration `more`, each once, by size, with FLOPs counted per datum.

    Args:
        found: records of finished runs.
        per: the variable of the law that compute buys: `D`, or `S` of laws of repeated data.

    `UserError` where both declare one name for two sizes.
    """
    ratio = 1.0 if per == "S" else samples_per_datum(found, sweep)
    vocabulary = found[0]["vocab_size"]
    rungs: dict[str, Rung] = {}
    for declared in (sweep, *([more] if more else [])):
        for run in {run.model: run for run in reversed(declared.runs)}.values():
            cost = step_cost.of_config(run.config(), vocabulary)
            rung = Rung(run.model, float(getattr(cost.sizes, sweep.model_size)), cost.training.total * ratio)
            if (before := rungs.setdefault(run.model, rung)) != rung:
                raise UserError(
                    f"--ladder: {run.model} has N {rung.n:.6g} and {rung.flops:.4g} FLOPs there, but {before.n:.6g} and "
                    f"{before.flops:.4g} in the sweep: name it otherwise, or leave it out"
                )
    return sorted(rungs.values(), key=lambda one: one.n)


def locate(config: Config, sweep: Sweep, found: Sequence[Mapping[str, Any]], variables: Sequence[str]) -> Point:
    """Where a training config lies under the law of `variables` that was fitted to the sweep.

    `found`: records of its finished runs. `UserError` while its data are not prepared, or where the law is not of such runs: of
    other settings that losses depend on, or of another length where D does not count it.
    """
    cost = step_cost.of_config(config, found[0]["vocab_size"])
    patients, count = plan.data_size(config)
    if count is None:
        raise UserError("data.train or data.valid is not a prepared folder (no manifest.json): run mg3d prepare first")
    samples = total_steps(config.training, config.data.batch_size, count) * config.data.batch_size
    counted: dict[str, float] = {"unique_patients": patients, RECORDS: count, SEEN: samples}
    counted["batch_size"] = config.data.batch_size
    counted[sweep.model_size] = getattr(cost.sizes, sweep.model_size)
    _check_settings(config, sweep)
    if "D" in variables:
        _check_length(counted, sweep, found)
    at = {name: float(counted[collect.variables_of(sweep)[name]]) for name in variables}
    return Point(at, float(samples * cost.training.total), _off_rule(config, sweep, at["N"]))


def _check_settings(config: Config, sweep: Sweep) -> None:
    wanted, got = (collect.comparable_settings(one) for one in (sweep.runs[0].config(), config))
    if other := [f"{key} {got[key]} (the sweep: {wanted[key]})" for key in wanted if got[key] != wanted[key]]:
        raise UserError(
            f"the law is not of such a run: its losses are not comparable, it differs in {'; '.join(other)}"
        )


def _check_length(counted: Mapping[str, float], sweep: Sweep, found: Sequence[Mapping[str, Any]]) -> None:
    """A law of unique data is of runs that are as long as those of the sweep: in epochs, or in samples."""
    if sweep.data_size == SEEN:
        return
    kinds = {per: f"samples for each of the {per}" for per in dict.fromkeys((sweep.data_size, RECORDS))} | {"": SEEN}
    alike = [per for per in kinds if _same_length(found, per)]
    if not alike:
        raise UserError(f"the sweep's runs have several lengths for one {sweep.data_size}: declare data_size {SEEN}")
    if not any(_same_length([*found, counted], per) for per in alike):
        theirs, own = (one[SEEN] / (one[alike[0]] if alike[0] else 1) for one in (found[0], counted))
        raise UserError(
            f"the law is of runs of {theirs:.4g} {kinds[alike[0]]}; this config has {own:.4g}. Give it the sweep's length, or "
            f"fit a sweep whose data_size is {SEEN}"
        )


def _off_rule(config: Config, sweep: Sweep, n: float) -> list[str]:
    flat = config_lib.flatten(config)
    said = []
    for key, reference, at, exponent in sweep.rule:
        wanted, got = by_rule(reference, at, exponent, n), float(flat[key])
        if abs(got / wanted - 1) > SAME_SETTING:
            said.append(f"{key} is {got:g}; by the sweep's rule, which the law is of, it would be {wanted:g}")
    return said

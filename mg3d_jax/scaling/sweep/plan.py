"""What a sweep will do and cost, before it does it; and where it stands."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np

from mg3d_jax.config import Config
from mg3d_jax.data.pipeline import subset_of
from mg3d_jax.data.records import MANIFEST_NAME, read_manifest
from mg3d_jax.errors import UserError
from mg3d_jax.progress import format_seconds
from mg3d_jax.scaling.fit import precision
from mg3d_jax.scaling.fit.plots import format_size
from mg3d_jax.scaling.sweep import collect, states
from mg3d_jax.scaling.sweep.declaration import Run, Sweep
from mg3d_jax.scaling.sweep.speed import Speed
from mg3d_jax.scaling.sweep.states import Status
from mg3d_jax.training import cost as step_cost
from mg3d_jax.training.cost import StepCost
from mg3d_jax.training.schedule import total_steps


@dataclass(frozen=True)
class Planned:
    """One run and its cost. `records`, `steps`, `samples` and FLOPs are None while the data are not prepared."""

    run: Run
    cost: StepCost
    status: Status
    patients: int
    records: int | None
    steps: int | None
    samples: int | None
    training_flops: float | None
    seconds: float | None  # at the given speed, or that of the finished runs of this sweep
    state_bytes: int  # of parameters, moments and average, on all devices together
    storage_bytes: int  # of the checkpoints that stay


def plan(sweep: Sweep, workdir: Path, speed: Speed | None = None) -> list[Planned]:
    """Every run with its cost and what `mg3d sweep run` would do with it. `UserError` if the data do not allow it.

    `speed`: that of the finished runs of this sweep by default.
    """
    speed = speed or Speed.measured(collect.records(workdir, sweep))
    planned = []
    for run in sweep.runs:
        config = run.config()
        cost = step_cost.of_config(config)
        patients, count = data_size(config)
        steps = None if count is None else total_steps(config.training, config.data.batch_size, count)
        samples = None if steps is None else steps * config.data.batch_size
        # A branch begins where its trunk is.
        own = None if steps is None else (steps - run.begins) * config.data.batch_size
        work = None if own is None else own * cost.training.total
        seconds = work / speed.run if work and speed else None
        state = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(cost.setup.abstract))
        kept = config.training.keep_checkpoints + len(config.training.keep_steps)
        status = states.status(workdir, run)
        planned.append(Planned(run, cost, status, patients, count, steps, samples, work, seconds, state, kept * state))
    return planned


def data_size(config: Config) -> tuple[int, int | None]:
    """Unique patients and records that a run trains on; records are None before the data are prepared.

    `UserError` where there are too few patients, or where a patient is in both the training and the held-out data.
    """
    wanted, train = config.data.max_patients, tuple(config.data.train)
    folders = [Path(folder) for folder in (*train, *config.data.valid)]
    if not all((folder / MANIFEST_NAME).is_file() for folder in folders):
        return wanted * len(train), None
    listed = [read_manifest(folder)["patients"] for folder in folders[: len(train)]]
    if wanted > max(map(len, listed)):
        raise UserError(f"the sweep wants {wanted} patients; {', '.join(train)} have {max(map(len, listed))}")
    held_out = {name for folder in folders[len(train) :] for name, _ in read_manifest(folder)["patients"]}
    if shared := sorted({name for one in listed for name, _ in one} & held_out):
        raise UserError(
            f"{len(shared)} patients are in data.train and in data.valid, e.g. {shared[0]}: that loss would not be "
            "held out; prepare splits that share no patient"
        )
    used = [subset_of(one, **config.data.subset()) for one in listed]
    return sum(len(one.counts) for one in used), sum(len(one.numbers) for one in used)


def plan_table(sweep: Sweep, planned: Sequence[Planned], speed: Speed | None = None) -> str:
    """The plan as text, with totals and what is missing. `speed`: that of `plan`, to say where times come from."""
    head = [
        "run",
        "N",
        "vision",
        "text",
        "patients",
        "records",
        "samples",
        "steps",
        "FLOPs",
        "time",
        "memory",
        "action",
    ]
    lines = [head]
    for one in planned:
        counted = one.cost.sizes
        sizes = (getattr(counted, sweep.model_size), counted.n_vision, counted.n_text)
        data = (one.patients, one.records, one.samples, one.steps)
        lines.append(
            [
                one.run.id,
                *(format_size(size) for size in sizes),
                *("?" if value is None else f"{value:,}" for value in data),
                "?" if one.training_flops is None else f"{one.training_flops:.3g}",
                "?" if one.seconds is None else format_seconds(one.seconds),
                f"{one.state_bytes / 2**30:.3g} GiB",
                one.status.action,
            ]
        )
    open_runs = [one for one in planned if one.status.state != states.DONE]
    work, seconds = ([getattr(one, name) for one in open_runs] for name in ("training_flops", "seconds"))
    text = [align(lines), f"{len(planned)} runs, {len(open_runs)} to do"]
    if None not in work and open_runs:
        text[-1] += f", {sum(work):.3g} FLOPs"
    if None not in seconds and open_runs:
        text[-1] += f", about {format_seconds(sum(seconds))} one after another"
        if speed is not None and speed.devices:
            text[-1] += f", {sum(seconds) * speed.devices / 3600:,.3g} device-hours"
        text[-1] += f" ({speed.source})" if speed is not None else ""
    stored = sum(one.storage_bytes for one in open_runs)
    text.append(
        f"memory is that of parameters, moments and average; gradients and activations come on top (mg3d bench memory). "
        f"Checkpoints to come: {stored / 2**30:.3g} GiB"
    )
    text.append(f"N is {sweep.model_size}, D is {sweep.data_size}, the law describes {sweep.loss}")
    text += notes(sweep)
    if any(one.records is None for one in planned):
        text.append("records, samples and FLOPs are not known: data.train or data.valid is not prepared yet")
    return "\n".join(text)


def precision_text(sweep: Sweep, planned: Sequence[Planned], noise: float) -> str:
    """How sure the law will be, by simulation of these very runs. Checks are no part of it."""
    runs = [one for one in planned if one.run.factor == 1]
    values = {"unique_patients": "patients", "unique_records": "records", "samples_seen": "samples"}
    data = [getattr(one, values[sweep.data_size]) for one in runs]
    if None in data:
        return "how sure the law will be is not known: the data are not prepared yet"
    sizes = [getattr(one.cost.sizes, sweep.model_size) for one in runs]
    return precision.expected(np.array(sizes, float), np.array(data, float), noise=noise).text()


def notes(sweep: Sweep) -> list[str]:
    """What about the declaration will be hard to believe afterwards."""
    found, seeds = [], {run.seed for run in sweep.runs}
    if len(seeds) > 1 and len({run.subset for run in sweep.runs}) == 1:
        found.append(
            "! all seeds train on the same patients of each number: what is special about them cannot be told from what their "
            "number does. Give subset_seeds"
        )
    if sweep.loss == "valid/alignment":
        found.append(
            "! valid/alignment is measured over batches: its floor and its noise are those of the batch. The loss over fixed "
            "pools is evaluation/pool_loss, with evaluations.pool_loss.every"
        )
    if not sweep.checked_key and len({run.model for run in sweep.runs}) > 1:
        found.append("! nothing checks the learning rate at the smallest and the largest model: give 'check'")
    return found


def align(lines: Sequence[Sequence[str]]) -> str:
    """Columns padded to equal width; the first is left aligned, numbers right aligned."""
    widths = [max(len(line[k]) for line in lines) for k in range(len(lines[0]))]
    left = {0, len(widths) - 1}
    return "\n".join(
        "  ".join(
            cell.ljust(w) if k in left else cell.rjust(w) for k, (cell, w) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )

"""`mg3d bench step`: where the time, the memory and the FLOPs of one training step go.

The program is the one that trains, on this machine's devices, with a batch of random patients. Its own trace says how its
time is spent; see `op_times`. FLOPs are counted in the losses and their gradient as JAX traces them (`training.cost`).
"""

from __future__ import annotations

import argparse
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.table import Table

from mg3d_jax import config as config_lib
from mg3d_jax import devices, sharding
from mg3d_jax.benchmarks import hlo, op_times, step_cases
from mg3d_jax.benchmarks.patients import random_batch
from mg3d_jax.config import Config, checks
from mg3d_jax.data.tokens import SPECIAL_TOKENS
from mg3d_jax.errors import UserError
from mg3d_jax.files import write_json
from mg3d_jax.training import state as state_lib
from mg3d_jax.training import step as step_lib
from mg3d_jax.training.cost import StepCost
from mg3d_jax.training.tables import LOG_WIDTH, human, mesh_text, tower_parameters

SPECIAL_IDS = {name: number for number, name in enumerate(SPECIAL_TOKENS)}  # of the tokens of random patients


def measure(config: Config, *, steps: int = 3) -> dict[str, Any]:
    """Compiles the step of `config`, runs it `1 + steps` times and once more under the profiler.

    Returns:
        `seconds` per step (median, from the batch on the host to the new state), `first_step_seconds`, `compile_seconds`,
        `data_seconds` (host to device), `parts` and `phases` (seconds by name; parts also TFLOPs), `memory` (bytes per
        device), `collectives`, `flops` (see `count_flops`), and what it was measured on.
    """
    vocab_size, special = config.data.vocab_size, SPECIAL_IDS
    mesh = sharding.make_mesh(config.mesh)
    setup = state_lib.build(config, vocab_size, mesh, steps=1000, records=1000 * config.data.batch_size)
    host = random_batch(config, vocab_size)
    rows = sharding.local_rows(mesh, config.data.batch_size)
    host = {name: array[list(rows)] for name, array in host.items()}

    def load() -> dict[str, jax.Array]:
        return jax.block_until_ready(sharding.to_global(host, mesh, config.data.batch_size))

    start = time.perf_counter()
    compiled = step_lib.train_step(setup, special).compile(setup.abstract, load())
    result: dict[str, Any] = {"compile_seconds": time.perf_counter() - start}
    box = [state_lib.initialize(setup)]
    data, whole = [], []

    def one() -> None:
        begin = time.perf_counter()
        batch = load()
        data.append(time.perf_counter() - begin)
        box[0], metrics = compiled(box[0], batch)
        jax.block_until_ready((box[0], metrics))
        whole.append(time.perf_counter() - begin)

    for _ in range(steps + 1):
        one()
    result |= {"first_step_seconds": whole[0], "data_seconds": float(np.median(data[1:]))}
    result["seconds"] = float(np.median(whole[1:]))
    program = hlo.instructions(compiled.as_text())
    result |= _breakdown(op_times.trace_operations(one), program, result["seconds"] - result["data_seconds"])
    result["memory"] = memory(compiled)
    result["collectives"] = hlo.collectives(program)
    result["flops"] = count_flops(StepCost(setup)) | {"cost_analysis": _cost_analysis(compiled)}
    for part, value in result["flops"].pop("by_part").items():
        result["parts"].setdefault(part, {"seconds": 0.0})["flops"] = value
    peak, source = devices.peak_flops(config.model.dtype)
    return result | {
        "config": config.name,
        "patients": config.data.batch_size,
        "device": f"{mesh.devices.size} x {mesh.devices.flat[0].device_kind}",
        "mesh": mesh_text(config.mesh, mesh),
        "parameters": tower_parameters(setup.abstract["params"])["total"],
        "dtype": config.model.dtype,
        "remat": config.model.remat,
        "attention": setup.model.attention[0],
        "peak_flops": None if peak is None else peak * mesh.devices.size,
        "peak_source": source,
    }


def _breakdown(busy: Mapping[str, float], program: Sequence[hlo.Instruction], seconds: float) -> dict[str, Any]:
    """`parts` and `phases` of `seconds`, in proportion to the busy time of their operations."""
    table = op_times.by_part_and_phase(busy, {one.name: one for one in program})
    scale = seconds / max(sum(table.values()), 1e-12)
    parts: dict[str, dict[str, float]] = defaultdict(lambda: {"seconds": 0.0})
    phases: dict[str, float] = defaultdict(float)
    for (part, phase), value in table.items():
        parts[part]["seconds"] += value * scale
        parts[part][phase] = parts[part].get(phase, 0.0) + value * scale
        phases[phase] += value * scale
    return {"parts": dict(parts), "phases": dict(phases)}


def memory(compiled: jax.stages.Compiled) -> dict[str, int] | None:
    """Bytes per device by the compiler; `reused` of the outputs lie where arguments were (the donated state)."""
    found = compiled.memory_analysis()
    if found is None:
        return None
    return {
        "arguments": found.argument_size_in_bytes,
        "outputs": found.output_size_in_bytes,
        "reused": found.alias_size_in_bytes,
        "temporaries": found.temp_size_in_bytes,
    }


def count_flops(cost: StepCost) -> dict[str, Any]:
    """Matrix-product FLOPs of the gradient of one batch, whole mesh: `model`, with nothing recomputed, `recomputed`, what
    `model.remat` adds, and `by_part` of the model, without what is recomputed."""
    found: defaultdict[str, float] = defaultdict(float)
    recomputed = 0.0
    for path, one in cost.by_path.items():
        if op_times.phase_of(path) == op_times.RECOMPUTED:
            recomputed += one.products * cost.losses_per_batch
        elif one.products:
            found[op_times.part_of(path)] += one.products * cost.losses_per_batch
    return {"model": sum(found.values()), "recomputed": recomputed, "by_part": dict(found)}


def _cost_analysis(compiled: jax.stages.Compiled) -> float | None:
    return (compiled.cost_analysis() or {}).get("flops")


def table_console() -> Console:
    """As wide as the terminal, and as a log where there is none."""
    console = Console()
    return console if console.is_terminal else Console(width=LOG_WIDTH)


def print_tables(result: Mapping[str, Any]) -> None:
    """The tables on stdout."""
    console, seconds, patients = table_console(), result["seconds"], result["patients"]
    console.print(
        f"[bold]{result['config']}[/bold]: {patients} patients on {result['device']}, mesh {result['mesh']}; "
        f"{human(result['parameters'])} parameters, {result['dtype']}, remat {result['remat']}, attention "
        f"{result['attention']}"
    )
    console.print(
        f"{seconds:.3f} s per step, {patients / seconds:.3g} samples/s (first step {result['first_step_seconds']:.2f} s, "
        f"compiled in {result['compile_seconds']:.1f} s)"
    )
    if result["peak_flops"]:
        share = result["flops"]["model"] / seconds / result["peak_flops"]
        peak = f"{human(result['peak_flops'], 'FLOP/s')}, {result['peak_source']}"
        console.print(f"model-FLOPs utilisation {share:.1%} of {peak}")
    table = Table(title="time of a step", title_justify="left")
    for heading in ("", "seconds", "share"):
        table.add_column(heading, justify="left" if not heading else "right")
    rows = {"batch to the devices": result["data_seconds"]} | dict(
        sorted(result["phases"].items(), key=lambda r: -r[1])
    )
    for name, value in rows.items():
        table.add_row(name, f"{value:.3f}", f"{value / seconds:.1%}")
    console.print(table)
    console.print(_parts_table(result))
    console.print(_flops_text(result["flops"]))
    if result["memory"]:
        sizes = ", ".join(f"{name} {human(size, 'B')}" for name, size in result["memory"].items())
        console.print(f"memory of a step, per device, by the compiler: {sizes}")
    moved = [f"{kind} {times} x, {human(size, 'B')}" for kind, (times, size) in result["collectives"].items()]
    console.print(f"collectives of a step, per device: {'; '.join(moved) or 'none'}")


def _parts_table(result: Mapping[str, Any]) -> Table:
    """Seconds of every part of the model by phase, its FLOPs and its rate."""
    phases = [p for p in ("forward", "recomputed", "backward") if any(p in row for row in result["parts"].values())]
    table = Table(title="by part of the model (shares of the devices' busy time)", title_justify="left")
    for heading in ("", "seconds", "share", *phases, "GFLOP", "GFLOP/s"):
        table.add_column(heading, justify="left" if not heading else "right")
    for part, row in sorted(result["parts"].items(), key=lambda item: -item[1]["seconds"]):
        work, seconds = row.get("flops", 0.0), row["seconds"]
        times = [f"{row[phase]:.3f}" if phase in row else "" for phase in phases]
        rate = f"{work / seconds / 1e9:.1f}" if work and seconds else ""
        share = f"{seconds / result['seconds']:.1%}"
        table.add_row(part, f"{seconds:.3f}", share, *times, f"{work / 1e9:.1f}" if work else "", rate)
    return table


def _flops_text(counted: Mapping[str, Any]) -> str:
    text = f"matrix products of a step: {human(counted['model'], 'FLOP')}"
    if counted["recomputed"]:
        text += f"; recomputed under remat: {human(counted['recomputed'], 'FLOP')}"
    if counted["cost_analysis"]:
        text += f"; XLA's cost_analysis, which takes the body of a loop once: {human(counted['cost_analysis'], 'FLOP')}"
    return text


def parse(argv: list[str]) -> tuple[argparse.Namespace, Config]:
    """Options and the validated config: a file or a named case, with overrides."""
    parser = argparse.ArgumentParser(prog="mg3d bench step", description=__doc__)
    config_lib.add_arguments(parser, required=False)
    parser.add_argument(
        "--case", choices=sorted(step_cases.CASES), help="a named configuration instead of --config FILE (mg3d-b)"
    )
    parser.add_argument("--batch", type=int, metavar="B", help="patients per step, of all devices together")
    parser.add_argument("--steps", type=int, default=3, help="timed steps after the first; the median counts (3)")
    parser.add_argument("--report-frozen", action="store_true", help="do not train the report encoder")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the numbers there")
    overrides, own = config_lib.split_overrides(argv)
    args = parser.parse_args(own)
    if args.config and args.case:
        raise UserError(f"give --config {args.config} or --case {args.case}, not both")
    if args.steps < 1:
        raise UserError(f"--steps {args.steps} must be at least 1")
    config = config_lib.load(args.config or f"{step_cases.__file__}:{args.case or 'mg3d-b'}", overrides)
    changes: dict[str, Any] = {"data.batch_size": args.batch or config.data.batch_size}
    if args.report_frozen:
        changes["optimizer.freeze"] = tuple(dict.fromkeys((*config.optimizer.freeze, step_cases.FROZEN_REPORT)))
    return args, of_random_patients(config, changes)


def of_random_patients(config: Config, changes: Mapping[str, Any]) -> Config:
    """The configuration with these changes, of a run over patients that no file holds; validated."""
    length = {"training.steps": 1000, "training.epochs": 0.0, "training.samples": 0}
    data = {"data.train": config.data.train or ("random patients",)}
    config = config_lib.replace(config, {**changes, **length, **data})
    checks.validate(config)
    return config


def main(argv: list[str]) -> int:
    args, config = parse(argv)
    result = measure(config, steps=args.steps)
    print_tables(result)
    if args.json:
        write_json(args.json, result)
    return 0

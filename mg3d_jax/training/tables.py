"""What a run says about itself before its first step."""

from __future__ import annotations

import math
from collections.abc import Mapping

import jax
from rich.console import Console
from rich.table import Table

from mg3d_jax.training.state import Setup, count


def human(number: float, unit: str = "") -> str:
    """`1234567 -> '1.23 M'`."""
    for threshold, letter in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= threshold:
            return f"{number / threshold:.3g} {letter}{unit}"
    return f"{number:.3g} {unit}".rstrip()


def tower_parameters(params: Mapping) -> dict[str, int]:
    """Parameters per top-level part of the model, and in total."""
    return {name: count(part) for name, part in params.items()} | {"total": count(params)}


def start_table(setup: Setup, compiled: jax.stages.Compiled, *, data: Mapping[str, str], flops: float) -> None:
    """Prints devices, mesh, parameters, tokens, FLOPs and memory of the run."""
    config, devices = setup.config, setup.mesh.devices.flatten()
    table = Table(title=f"{config.name}", show_header=False, title_justify="left")
    kinds = sorted({d.device_kind for d in devices})
    table.add_row("devices", f"{devices.size} x {', '.join(kinds)} in {jax.process_count()} process(es)")
    table.add_row("mesh", ", ".join(f"{axis} {size}" for axis, size in setup.mesh.shape.items()))
    for name, value in data.items():
        table.add_row(name, value)
    for name, number in tower_parameters(setup.abstract["params"]).items():
        table.add_row(f"parameters, {name.replace('_', ' ')}", f"{number:,}")
    patch = config.model.volume_encoder.patch_size
    grid = [s // p for s, p in zip(config.model.volume_size, patch, strict=True)]
    table.add_row(
        "tokens per volume",
        f"{math.prod(grid)} ({' x '.join(map(str, grid))} patches of {' x '.join(map(str, patch))})",
    )
    table.add_row("attention", f"{setup.attention[0]}: {setup.attention[1]}")
    table.add_row("steps", f"{setup.steps:,} of {config.data.batch_size} samples")
    table.add_row("FLOPs per step", human(flops, "FLOP"))
    table.add_row("memory of a step, per device", memory_text(compiled))
    Console(stderr=True).print(table)


def memory_text(compiled: jax.stages.Compiled) -> str:
    """Arguments (state and batch) plus temporaries of the compiled step, per device."""
    analysis = compiled.memory_analysis()
    if analysis is None:
        return "not known on this platform"
    arguments, temporaries = analysis.argument_size_in_bytes, analysis.temp_size_in_bytes
    return f"{human(arguments + temporaries, 'B')} (arguments {human(arguments, 'B')}, temporaries {human(temporaries, 'B')})"

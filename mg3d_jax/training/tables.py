"""What a run says about itself before its first step."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding
from rich.console import Console
from rich.table import Table

from mg3d_jax import sharding
from mg3d_jax.data.pipeline import PreparedData, cut_shares
from mg3d_jax.data.tokens import ReportTokenizer
from mg3d_jax.training.state import Setup, count

LARGEST = 12  # arrays listed at the start
LOG_WIDTH = 150  # columns where the output is no terminal


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
    """Prints devices, mesh, parameters, tokens, FLOPs and memory of the run, and its largest arrays."""
    config, devices = setup.config, setup.mesh.devices.flatten()
    table = Table(title=f"{config.name}", show_header=False, title_justify="left")
    kinds = sorted({d.device_kind for d in devices})
    table.add_row("devices", f"{devices.size} x {', '.join(kinds)} in {jax.process_count()} process(es)")
    table.add_row("mesh", mesh_text(config.mesh, setup.mesh))
    for name, value in data.items():
        table.add_row(name, value)
    for name, number in tower_parameters(setup.abstract["params"]).items():
        table.add_row(f"parameters, {name.replace('_', ' ')}", f"{number:,}")
    patch, grid = config.model.token_cell(), config.model.token_grid()
    table.add_row(
        "tokens per volume",
        f"{math.prod(grid)} ({' x '.join(map(str, grid))} patches of {' x '.join(map(str, patch))})",
    )
    table.add_row("attention", ": ".join(setup.model.attention))
    table.add_row("steps", f"{setup.steps:,} of {config.data.batch_size} samples")
    for name, group in setup.groups.items():
        what = "not trained" if not group.factor else f"{group.factor:g} times the learning rate"
        table.add_row(f"parameters {name}", f"{len(group.parameters)} arrays, {what}")
    if config.optimizer.layer_decay != 1:
        table.add_row(
            "layer-wise decay", decay_text(config.optimizer.layer_decay, config.model.volume_encoder.sizes.depth)
        )
    table.add_row("FLOPs per step", human(flops, "FLOP"))
    table.add_row("memory of a step, per device", memory_text(compiled))
    console = Console(stderr=True)
    if not console.is_terminal:
        console = Console(stderr=True, width=LOG_WIDTH)
    console.print(table)
    console.print(array_table(setup.abstract, setup.mesh))


def decay_text(decay: float, depth: int) -> str:
    """What `optimizer.layer_decay` = `decay` makes of the learning rate at the two ends of a volume tower of `depth` layers."""
    ends = f"{decay ** (depth + 1):.3g} before layer 1 of the volume tower, {decay:g} at its last"
    return f"{decay:g} per layer of a tower: {ends}"


def data_rows(data: PreparedData, tokenizer: ReportTokenizer, alignment: Any) -> dict[str, str]:
    """How much is trained on, and what the limits of the text cut of it. `alignment`: `config.objectives["alignment"]`."""
    shares = cut_shares(data, tokenizer, alignment.sentence_tokens)
    return {
        "records": f"{len(data):,} of {data.patients:,} patients",
        "text that is cut": cut_text(tokenizer, alignment, *shares),
    }


def cut_text(tokenizer: ReportTokenizer, alignment: Any, reports: float, sentences: float) -> str:
    """What the shares of `pipeline.cut_shares` mean for the keys that set the limits."""
    limits = f"{tokenizer.max_tokens} tokens or {tokenizer.max_sentences} sentences"
    text = f"{reports:.1%} of reports are longer than {limits}"
    if alignment.weight > 0 and alignment.report_view != "report":
        text += f", {sentences:.1%} of single sentences than {alignment.sentence_tokens} tokens"
    return text


def memory_text(compiled: jax.stages.Compiled) -> str:
    """Arguments (state and batch) plus temporaries of the compiled step, per device."""
    analysis = compiled.memory_analysis()
    if analysis is None:
        return "not known on this platform"
    arguments, temporaries = analysis.argument_size_in_bytes, analysis.temp_size_in_bytes
    return f"{human(arguments + temporaries, 'B')} (arguments {human(arguments, 'B')}, temporaries {human(temporaries, 'B')})"


def mesh_text(config: sharding.MeshConfig, mesh: Mesh) -> str:
    """E.g. `data 4, fsdp 8, tensor 1 in 2 slices (preset gpu-node)`."""
    text = ", ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
    text += f" in {config.slices} slices" if config.slices > 1 else ""
    return text + (f" (preset {config.preset})" if config.preset else "")


@dataclass(frozen=True)
class ArrayRow:
    """A parameter together with those of its moments and averages that have its shape and sharding.

    Attributes:
        name: of the parameter.
        kinds: e.g. `("mu", "nu", "params")`.
        size: bytes of all kinds together; `device_size`: bytes of them on one device.
        spec: see `spec_text`.
    """

    name: str
    kinds: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: str
    size: int
    device_size: int
    spec: str


def spec_text(place: NamedSharding, dimensions: int) -> str:
    """Mesh axes that split every dimension, "-" where it is whole: `(-, fsdp, tensor)`; "whole" if all of them are."""
    axes = sharding.split_axes(place, dimensions)
    return f"({', '.join('+'.join(names) or '-' for names in axes)})" if any(axes) else "whole"


def array_rows(state: Mapping[str, Any]) -> list[ArrayRow]:
    """All arrays of a state (shapes with shardings, or arrays), the largest first; scalars are left out."""
    parameters = {_path_text(path) for path, _ in jax.tree_util.tree_leaves_with_path(state["params"])}
    groups: dict[tuple, list[str]] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        if leaf.ndim:
            name, kind = _parameter_and_kind(path, parameters)
            place = leaf.sharding
            sizes = (leaf.size, math.prod(place.shard_shape(leaf.shape)))
            key = (name, leaf.shape, leaf.dtype, sizes, spec_text(place, leaf.ndim))
            groups.setdefault(key, []).append(kind)
    rows = []
    for (name, shape, dtype, (size, device_size), spec), kinds in groups.items():
        each = dtype.itemsize * len(kinds)
        rows.append(ArrayRow(name, tuple(kinds), shape, dtype.name, size * each, device_size * each, spec))
    return sorted(rows, key=lambda row: (-row.size, row.name))


def _parameter_and_kind(path: tuple, parameters: set[str]) -> tuple[str, str]:
    """`opt_state/.../mu/volume_encoder/...` -> `("volume_encoder/...", "mu")`, whatever the optimizer wraps around it."""
    for start in range(1, len(path)):
        if (name := _path_text(path[start:])) in parameters:
            return name, _path_text(path[start - 1 : start])
    return _path_text(path[1:]), _path_text(path[:1])


def _path_text(path: tuple) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def array_table(state: Mapping[str, Any], mesh: Mesh) -> Table:
    """The largest arrays of the state: where their bytes are, and how many parameters every device holds whole."""
    rows = array_rows(state)
    table = Table(title="largest arrays", title_justify="left", caption_justify="left")
    for heading in ("parameter", "with its", "shape", "dtype"):
        table.add_column(heading)
    for heading in ("bytes", "per device"):
        table.add_column(heading, justify="right")
    table.add_column("split over")
    for row in rows[:LARGEST]:
        shape, kinds = " x ".join(map(str, row.shape)), ", ".join(k for k in row.kinds if k != "params")
        table.add_row(row.name, kinds, shape, row.dtype, human(row.size, "B"), human(row.device_size, "B"), row.spec)
    rest, total = rows[LARGEST:], (sum(r.size for r in rows), sum(r.device_size for r in rows))
    if rest:
        sizes = sum(r.size for r in rest), sum(r.device_size for r in rest)
        table.add_row(f"{len(rest)} others", "", "", "", *(human(size, "B") for size in sizes), "")
    table.add_row("all", "", "", "", *(human(size, "B") for size in total), "")
    if mesh.shape["fsdp"] * mesh.shape["tensor"] > 1:
        table.caption = f"{sharding.whole_share(state['params']):.2%} of the parameters are whole on every device"
    return table

"""`mg3d bench memory`: how many patients fit on a device, from the compiler, before anything is run or rented.

The step that trains is compiled for one batch size after the other and never run; the sizes are those that the compiler
plans with (`step.memory`). `--topology v5e:2x2` compiles for TPUs that are not here (needs libtpu). There is no such
compiler for GPUs without a GPU: a TPU's plan is the nearest to it, as both keep bfloat16 as it is, while CPUs widen it.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import jax
from jax.experimental import topologies
from jax.sharding import Mesh
from rich.table import Table

from mg3d_jax import config as config_lib
from mg3d_jax import sharding
from mg3d_jax.benchmarks.patients import random_batch
from mg3d_jax.benchmarks.step import SPECIAL_IDS, memory, of_random_patients, table_console
from mg3d_jax.config import Config
from mg3d_jax.errors import UserError
from mg3d_jax.files import write_json
from mg3d_jax.progress import Progress
from mg3d_jax.training import state as state_lib
from mg3d_jax.training import step as step_lib
from mg3d_jax.training.memory import GIB, SPARE
from mg3d_jax.training.tables import mesh_text


def devices_of(topology: str) -> Sequence[jax.Device]:
    """This machine's devices, or those of a TPU topology, e.g. "v5e:2x2" (`jax.experimental.topologies`)."""
    if not topology:
        return jax.devices()
    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    except Exception as error:  # of many types, by what is missing
        raise UserError(
            f"--topology {topology}: {str(error).splitlines()[0]}. It takes libtpu (pip install libtpu) and a name such "
            "as v5e:2x2"
        ) from error


def bytes_by_batch(config: Config, mesh: Mesh, batches: Sequence[int]) -> dict[int, dict[str, int]]:
    """Bytes per device of the compiled step for each number of patients, of all devices together.

    Returns:
        by batch size: `state` (parameters, moments and the batch) and `temporaries`, which together is what a step needs.
    """
    patient = random_batch(config_lib.replace(config, {"data.batch_size": 1}), config.data.vocab_size)
    place = sharding.batch_sharding(mesh)
    found: dict[int, dict[str, int]] = {}
    with Progress("compiling", total=len(batches)) as progress:
        for size in batches:
            one = config_lib.replace(config, {"data.batch_size": size})
            setup = state_lib.build(one, config.data.vocab_size, mesh, steps=1000, records=1000 * size)
            batch = {
                name: jax.ShapeDtypeStruct((size, *array.shape[1:]), array.dtype, sharding=place)
                for name, array in patient.items()
            }
            sizes = memory(step_lib.train_step(setup, SPECIAL_IDS).compile(setup.abstract, batch))
            if sizes is None:
                raise UserError("the compiler of this platform does not say what memory a program takes")
            found[size] = {"state": sizes["arguments"], "temporaries": sizes["temporaries"]}
            progress.advance()
    return found


def largest(sizes: dict[int, dict[str, int]], gib: float) -> int:
    """The largest of the batch sizes that fits into so many GiB less `SPARE`; 0: none does."""
    fits = [batch for batch, one in sizes.items() if sum(one.values()) <= gib * GIB * (1 - SPARE)]
    return max(fits, default=0)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="mg3d bench memory", description=__doc__)
    config_lib.add_arguments(parser)
    parser.add_argument("--batch", type=int, nargs="+", metavar="B", help="patients per device (1 2 4 ... 128)")
    parser.add_argument(
        "--gib", type=float, nargs="+", default=[16, 24, 40, 80], help="memory of devices (16 24 40 80)"
    )
    parser.add_argument(
        "--devices", type=int, metavar="N", help="how many devices (1): the state may be split over them"
    )
    parser.add_argument("--topology", default="", metavar="NAME", help="TPUs to compile for, e.g. v5e:2x2")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the numbers there")
    overrides, own = config_lib.split_overrides(argv)
    args = parser.parse_args(own)
    config = of_random_patients(config_lib.load(args.config, overrides), {})
    devices, count = devices_of(args.topology), args.devices or 1
    if count > len(devices):
        raise UserError(f"--devices {count}: there are {len(devices)}")
    mesh = sharding.make_mesh(config.mesh, list(devices)[:count])
    batches = sorted(args.batch or [2**power for power in range(8)])
    if batches[0] < 1:
        raise UserError(f"--batch {batches[0]}: at least 1")
    sizes = bytes_by_batch(config, mesh, [batch * count for batch in batches])
    _print(config, mesh, sizes, args.gib)
    if args.json:
        write_json(args.json, {"device": mesh.devices.flat[0].device_kind, "devices": count, "bytes": sizes})
    return 0


def _print(config: Config, mesh: Mesh, sizes: dict[int, dict[str, int]], gib: Sequence[float]) -> None:
    console = table_console()
    console.print(
        f"[bold]{config.name}[/bold] for {mesh.devices.size} x {mesh.devices.flat[0].device_kind}, mesh "
        f"{mesh_text(config.mesh, mesh)}, {config.model.dtype}, remat {config.model.remat}, compiled and not run"
    )
    table = Table(title="GiB per device", title_justify="left")
    for heading in ("patients", "state and batch", "temporaries", "together"):
        table.add_column(heading, justify="right")
    for batch, one in sizes.items():
        values = (one["state"], one["temporaries"], sum(one.values()))
        table.add_row(str(batch), *(f"{value / GIB:.2f}" for value in values))
    console.print(table)
    for size in gib:
        batch, tried = largest(sizes, size), max(sizes)
        text = f"{batch} patients{' or more' if batch == tried else ''}" if batch else "none of these"
        console.print(f"{size:g} GiB, {SPARE:.0%} kept free: {text}")

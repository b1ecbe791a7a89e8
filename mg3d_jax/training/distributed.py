"""Joins the processes of one run, and checks that each of them sees the devices that it should.

One process per host (TPU) or per node or GPU (SLURM); every process runs the same command. Who is who comes from, in
this order: the command line or `MG3D_COORDINATOR`, `MG3D_PROCESS_ID`, `MG3D_NUM_PROCESSES` (what `launch/local.sh` and
JobSet manifests set); SLURM; a JobSet on Kubernetes; TPU pods; Open MPI. `--cluster` (`MG3D_CLUSTER`) says it where the
environment does not, e.g. on TPU VMs, which are recognised by asking their metadata server.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import orbax.checkpoint as ocp

from mg3d_jax.errors import UserError

CLUSTERS = ("slurm", "jobset", "tpu", "ompi")
JOBSET_PORT = 8476


@dataclass(frozen=True)
class Place:
    """How this process joins: `cluster` names who said so; what is None is left to JAX's own detection."""

    cluster: str
    coordinator: str | None = None  # host:port
    num_processes: int | None = None
    process_id: int | None = None
    local_device_ids: tuple[int, ...] | None = None  # GPUs of this process among the visible ones


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options; their defaults are the `MG3D_*` variables."""
    group = parser.add_argument_group("several processes (recognised by themselves on SLURM, JobSet, TPU, Open MPI)")
    environment = os.environ.get
    group.add_argument("--coordinator", default=environment("MG3D_COORDINATOR"), metavar="HOST:PORT")
    group.add_argument("--process-id", type=int, default=environment("MG3D_PROCESS_ID"))
    group.add_argument("--num-processes", type=int, default=environment("MG3D_NUM_PROCESSES"))
    group.add_argument(
        "--cluster", choices=CLUSTERS, default=environment("MG3D_CLUSTER"), help="where the environment does not tell"
    )
    group.add_argument(
        "--expected-devices",
        type=int,
        default=environment("MG3D_EXPECTED_DEVICES"),
        metavar="N",
        help="devices that each process must see; fewer or more is an error before anything is built",
    )


def initialize(args: argparse.Namespace) -> None:
    """Joins the others, then checks the devices. Must run before the first use of a device; one process needs nothing.

    Raises `UserError` for contradicting settings and for a process that sees other devices than expected.
    """
    place = find_place(args, os.environ)
    if place is not None and place.num_processes != 1:
        try:
            jax.distributed.initialize(**_arguments(place))
        except (RuntimeError, ValueError) as error:
            raise UserError(
                f"this process cannot join the run (as {place.cluster}): {error}. Is the coordinator's host reachable, "
                "and do all processes run the same command?"
            ) from error
    check_devices(args.expected_devices, os.environ)


def _arguments(place: Place) -> dict[str, Any]:
    given = {
        "coordinator_address": place.coordinator,
        "num_processes": place.num_processes,
        "process_id": place.process_id,
        "local_device_ids": None if place.local_device_ids is None else list(place.local_device_ids),
    }
    return {name: value for name, value in given.items() if value is not None}


def find_place(args: argparse.Namespace, environment: Mapping[str, str]) -> Place | None:
    """This process's place by options and environment; None for a run of one process."""
    explicit = (args.coordinator, args.process_id, args.num_processes)
    jobset = environment.get("JOB_COMPLETION_INDEX")
    if any(value is not None for value in explicit):
        process_id = args.process_id
        if process_id is None and jobset is not None:
            process_id = int(jobset)  # the manifest names the coordinator and the number of pods
        if None in (args.coordinator, process_id, args.num_processes):
            raise UserError("give all of --coordinator HOST:PORT, --process-id and --num-processes, or none")
        if not 0 <= process_id < args.num_processes:
            raise UserError(f"--process-id {process_id} is not in 0..{args.num_processes - 1}")
        return Place("explicit", args.coordinator, args.num_processes, process_id)
    several_tpu_hosts = "," in environment.get("TPU_WORKER_HOSTNAMES", "") or (
        "MEGASCALE_COORDINATOR_ADDRESS" in environment
    )
    several_slurm_tasks = "SLURM_PROCID" in environment and _count(environment, "SLURM_NTASKS") > 1
    if args.cluster == "slurm" or several_slurm_tasks:
        return _slurm(environment)
    if args.cluster == "tpu" or several_tpu_hosts:
        return Place("tpu")
    if args.cluster == "jobset" or {"JOBSET_NAME", "JOB_COMPLETION_INDEX"} <= environment.keys():
        return _jobset(environment)
    if args.cluster == "ompi" or _count(environment, "OMPI_COMM_WORLD_SIZE") > 1:
        return Place("ompi")
    return None


def _count(environment: Mapping[str, str], name: str) -> int:
    return int(environment.get(name, "1"))


def _slurm(environment: Mapping[str, str]) -> Place:
    """JAX finds coordinator and rank. It would give every task one GPU, whatever the task was given; this does not."""
    needed = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID")
    if missing := [name for name in needed if name not in environment]:
        raise UserError(
            f"SLURM's {', '.join(missing)} not set: start the processes with srun (see launch/slurm.sbatch)"
        )
    return Place("slurm", num_processes=int(environment["SLURM_NTASKS"]), local_device_ids=slurm_gpus(environment))


def slurm_gpus(environment: Mapping[str, str]) -> tuple[int, ...] | None:
    """GPUs of this task, as indices into those that it sees; None where SLURM says nothing about GPUs.

    A task that is bound to some of the node's GPUs (`--gpus-per-task`) takes all it sees; otherwise the tasks of a node
    share its GPUs evenly, and a node's only task takes all of them.
    """
    on_node, listed = environment.get("SLURM_GPUS_ON_NODE"), environment.get("CUDA_VISIBLE_DEVICES")
    visible = len(listed.split(",")) if listed else int(on_node or 0)
    if visible == 0:
        return None
    if on_node and visible < int(on_node):
        return tuple(range(visible))
    tasks, local = tasks_on_node(environment), int(environment["SLURM_LOCALID"])
    if visible % tasks:
        raise UserError(f"{tasks} tasks on a node cannot share its {visible} GPUs evenly: change --ntasks-per-node")
    share = visible // tasks
    return tuple(range(local * share, (local + 1) * share))


def tasks_on_node(environment: Mapping[str, str]) -> int:
    """From `SLURM_STEP_TASKS_PER_NODE`, e.g. "2", "4(x8)" or "4(x2),3": the tasks on this node."""
    text = environment.get("SLURM_STEP_TASKS_PER_NODE") or environment.get("SLURM_TASKS_PER_NODE")
    if text is None:
        return _count(environment, "SLURM_NTASKS_PER_NODE")
    counts = []
    for part in text.split(","):
        number, repeat = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part).groups()
        counts += [int(number)] * int(repeat or 1)
    return counts[min(int(environment.get("SLURM_NODEID", "0")), len(counts) - 1)]


def _jobset(environment: Mapping[str, str]) -> Place:
    """A JobSet of one replicated job, whose manifest passes its names on (downward API) and the number of pods."""
    needed = ("JOBSET_NAME", "REPLICATED_JOB_NAME", "JOB_COMPLETION_INDEX", "MG3D_NUM_PODS")
    if missing := [name for name in needed if name not in environment]:
        raise UserError(
            f"on JobSet the manifest must set {', '.join(missing)}, or MG3D_COORDINATOR and MG3D_NUM_PROCESSES"
        )
    name, job = environment["JOBSET_NAME"], environment["REPLICATED_JOB_NAME"]
    coordinator = f"{name}-{job}-0-0.{name}:{JOBSET_PORT}"
    return Place("jobset", coordinator, int(environment["MG3D_NUM_PODS"]), int(environment["JOB_COMPLETION_INDEX"]))


def barrier(name: str, minutes: float = 60) -> None:
    """Waits until all processes of the run are here; `name` must be new each time. One process passes through.

    Unlike a collective on the devices it lets the others be minutes late (compiling, reading): collectives give up after
    half a minute when they are first used.
    """
    if jax.process_count() > 1:
        ocp.multihost.get_barrier_sync_fn()(key=f"mg3d/{name}", timeout_ms=round(minutes * 60_000))


def check_devices(expected: int | None, environment: Mapping[str, str]) -> None:
    """Says which devices this process has; `UserError` where they are not those expected.

    Without `--expected-devices` SLURM's allocation is what is expected: a task that was given GPUs and runs on the CPU,
    or on one GPU of eight, is the classic silent waste of a cluster.
    """
    local, count = jax.local_device_count(), jax.process_count()
    kind = jax.local_devices()[0].device_kind
    who = f"process {jax.process_index()} of {count}"
    source = "--expected-devices"
    if expected is None and "SLURM_PROCID" in environment and environment.get("JAX_PLATFORMS") != "cpu":
        gpus = slurm_gpus(environment)
        expected, source = None if gpus is None else len(gpus), "SLURM's allocation"
    if expected is not None and local != expected:
        raise UserError(
            f"{who} sees {local} device(s) ({kind}), but {source} says {expected}. Usual causes: a JAX without GPU "
            "support (pip install 'jax[cuda13]'), a task bound to one GPU of its node (--gpus-per-task, --gpu-bind), "
            "or CUDA_VISIBLE_DEVICES. To use fewer on purpose set MG3D_EXPECTED_DEVICES"
        )
    total = jax.device_count()
    if total != local * count:
        raise UserError(
            f"{who} sees {local} device(s), all {count} processes together {total}: every process must have the same "
            "number; set MG3D_EXPECTED_DEVICES to find the one that differs"
        )
    if count > 1:
        print(f"{who}: {local} x {kind}, {total} in all", file=sys.stderr, flush=True)

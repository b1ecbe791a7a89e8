"""Joins the processes of one run, and checks that each of them sees the devices that it should.

One process per host (TPU) or per node or GPU (SLURM); every process runs the same command. Who is who comes from, in
this order: the command line or `MG3D_COORDINATOR`, `MG3D_PROCESS_ID`, `MG3D_NUM_PROCESSES` (what `launch/local.sh` and
JobSet manifests set); SLURM; a JobSet on Kubernetes; TPU pods; Open MPI. `--cluster` (`MG3D_CLUSTER`) says it where the
environment does not, e.g. on TPU VMs, which are recognised by asking their metadata server.
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import os
import re
import socket
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import takewhile
from typing import Any, TypeVar, cast

import jax
import numpy as np
from jax.experimental import multihost_utils

from mg3d_jax.data import feed
from mg3d_jax.errors import TryAgainError, UserError, translated
from mg3d_jax.training import joining, storage

logger = logging.getLogger(__name__)
CLUSTERS = ("slurm", "jobset", "tpu", "ompi")
JOBSET_PORT = 8476
T = TypeVar("T")
_gathered = itertools.count()  # a barrier needs a new name each time
NO_GPUS = ("-1", "NoDevFiles", "none", "void", "")  # entries of CUDA_VISIBLE_DEVICES that hide GPUs


@dataclass(frozen=True)
class Place:
    """How this process joins: `cluster` names who said so; what is None is left to JAX's own detection.

    `alone`: no other process of the run is on this host, so all its GPUs are this one's.
    """

    cluster: str
    coordinator: str | None = None  # host:port
    num_processes: int | None = None
    process_id: int | None = None
    local_device_ids: tuple[int, ...] | None = None  # GPUs of this process among the visible ones
    alone: bool = False


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
        if place.cluster == "ompi" and "OMPI_MCA_orte_hnp_uri" not in os.environ:
            raise UserError(
                "this Open MPI (5 or newer) does not tell its processes where mpirun runs: add -x MG3D_COORDINATOR=HOST:PORT "
                "to mpirun, HOST being that of rank 0; rank and size are Open MPI's"
            )
        try:
            joining.join(_arguments(place))
        except (RuntimeError, ValueError) as error:
            kind = TryAgainError if "DEADLINE_EXCEEDED" in str(error) else UserError
            raise kind(
                f"this process cannot join the run (as {place.cluster}): {str(error).splitlines()[0]}. Is the coordinator's "
                "host reachable, and do all processes run the same command?"
            ) from error
        if place.alone and place.local_device_ids is None:
            # Where the scheduler does not say how many GPUs a task has, JAX has just decided on one.
            for name in ("jax_cuda_visible_devices", "jax_rocm_visible_devices"):
                jax.config.update(name, "all")
    check_devices(args.expected_devices, os.environ, place.cluster if place else None)


@contextmanager
def joined(args: argparse.Namespace) -> Iterator[None]:
    """`initialize`; when the block fails, this process of several leaves without waiting for the others."""
    try:
        initialize(args)
        yield
    except BaseException as error:
        if jax.distributed.is_initialized():
            known = translated(error)
            joining.leave(known.code if known else 1, str(known or type(error).__name__))
        raise


def ended(code: int) -> int:
    """The exit code of a run that has ended. Where a disk holds a thread of it, the process ends here: Python would wait."""
    if feed.hangs():
        joining.go(code)
    return code


def _arguments(place: Place) -> dict[str, Any]:
    given = {
        "coordinator_address": place.coordinator,
        "num_processes": place.num_processes,
        "process_id": place.process_id,
        "local_device_ids": None if place.local_device_ids is None else list(place.local_device_ids),
    }
    if None not in (place.coordinator, place.num_processes, place.process_id):
        # Everything is said. Inside a SLURM or Open MPI job JAX would still take one GPU per process.
        given["cluster_detection_method"] = "deactivate"
    return {name: value for name, value in given.items() if value is not None}


def find_place(args: argparse.Namespace, environment: Mapping[str, str]) -> Place | None:
    """This process's place by options and environment; None for a run of one process."""
    if any(value is not None for value in (args.coordinator, args.process_id, args.num_processes)):
        return _explicit(args, environment)
    hosts = environment.get("TPU_PROCESS_ADDRESSES") or environment.get("TPU_WORKER_HOSTNAMES", "")
    several_tpu_hosts = "," in hosts or "MEGASCALE_COORDINATOR_ADDRESS" in environment
    several_slurm_tasks = "SLURM_PROCID" in environment and _count(environment, "SLURM_NTASKS") > 1
    if args.cluster == "slurm" or several_slurm_tasks:
        return _slurm(environment)
    if args.cluster == "tpu" or several_tpu_hosts:
        return Place("tpu")
    if args.cluster == "jobset" or {"JOBSET_NAME", "JOB_COMPLETION_INDEX"} <= environment.keys():
        return _jobset(environment)
    if args.cluster == "ompi" or _count(environment, "OMPI_COMM_WORLD_SIZE") > 1:
        return _open_mpi(environment)
    return None


def _explicit(args: argparse.Namespace, environment: Mapping[str, str]) -> Place:
    """By the options. With `--coordinator` alone, rank and number come from an indexed Kubernetes job or from Open MPI."""

    def given(value: int | None, *names: str) -> int | None:
        return next((int(environment[name]) for name in names if name in environment), None) if value is None else value

    process_id = given(args.process_id, "JOB_COMPLETION_INDEX", "OMPI_COMM_WORLD_RANK")
    num_processes = given(args.num_processes, "MG3D_NUM_PODS", "OMPI_COMM_WORLD_SIZE")
    if args.coordinator is None or process_id is None or num_processes is None:
        raise UserError("give all of --coordinator HOST:PORT, --process-id and --num-processes, or none")
    if not 0 <= process_id < num_processes:
        raise UserError(f"--process-id {process_id} is not in 0..{num_processes - 1}")
    return Place("explicit", args.coordinator, num_processes, process_id)


def _open_mpi(environment: Mapping[str, str]) -> Place:
    """JAX finds coordinator and rank by `mpirun`'s variables, and gives every process one GPU; the shares are ours."""
    tasks, local = (
        _count(environment, "OMPI_COMM_WORLD_LOCAL_SIZE"),
        int(environment.get("OMPI_COMM_WORLD_LOCAL_RANK", "0")),
    )
    visible = visible_gpus(environment)
    share = None if not visible else _even_share(visible, tasks, local)
    return Place("ompi", local_device_ids=share, alone=tasks == 1)


def _count(environment: Mapping[str, str], name: str) -> int:
    return int(environment.get(name, "1"))


def _slurm(environment: Mapping[str, str]) -> Place:
    """JAX finds coordinator and rank. It would give every task one GPU, whatever the task was given; this does not."""
    needed = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID")
    if missing := [name for name in needed if name not in environment]:
        raise UserError(
            f"SLURM's {', '.join(missing)} not set: start the processes with srun (see launch/slurm.sbatch)"
        )
    gpus, tasks = slurm_gpus(environment), tasks_on_node(environment)
    return Place("slurm", num_processes=int(environment["SLURM_NTASKS"]), local_device_ids=gpus, alone=tasks == 1)


def visible_gpus(environment: Mapping[str, str]) -> int | None:
    """How many GPUs `CUDA_VISIBLE_DEVICES` lists; None where it is not set."""
    listed = environment.get("CUDA_VISIBLE_DEVICES")
    if listed is None:
        return None
    return sum(1 for _ in takewhile(lambda entry: entry.strip() not in NO_GPUS, listed.split(",")))


def _even_share(visible: int, tasks: int, local: int) -> tuple[int, ...]:
    if visible % tasks:
        raise UserError(f"{tasks} tasks on a node cannot share its {visible} GPUs evenly: change --ntasks-per-node")
    share = visible // tasks
    return tuple(range(local * share, (local + 1) * share))


def slurm_gpus(environment: Mapping[str, str]) -> tuple[int, ...] | None:
    """GPUs of this task, as indices into those that it sees; None where SLURM says nothing about GPUs.

    A task that is bound to some of the node's GPUs (`--gpus-per-task`) takes all it sees; otherwise the tasks of a node
    share its GPUs evenly, and a node's only task takes all of them.
    """
    on_node, visible = environment.get("SLURM_GPUS_ON_NODE"), visible_gpus(environment)
    if visible is None:
        visible = int(on_node or 0)
    if visible == 0:
        return None
    if on_node and visible < int(on_node):
        return tuple(range(visible))
    return _even_share(visible, tasks_on_node(environment), int(environment.get("SLURM_LOCALID", "0")))


def tasks_on_node(environment: Mapping[str, str]) -> int:
    """From `SLURM_STEP_TASKS_PER_NODE`, e.g. "2", "4(x8)" or "4(x2),3": the tasks on this node."""
    text = environment.get("SLURM_STEP_TASKS_PER_NODE") or environment.get("SLURM_TASKS_PER_NODE")
    if text is None:
        return _count(environment, "SLURM_NTASKS_PER_NODE")
    counts = []
    for part in text.split(","):
        if (found := re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)) is None:
            raise UserError(
                f"SLURM_STEP_TASKS_PER_NODE={text}: expected numbers such as 4(x2),3; start the processes with srun"
            )
        number, repeat = found.groups()
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
        storage.barrier(f"mg3d/{name}", minutes)


def gather_texts(name: str, text: str) -> list[str]:
    """The texts of all processes, in all of them, in their order. All must call it, in the same order of calls."""
    if jax.process_count() == 1:
        return [text]
    barrier(f"{name}-{next(_gathered)}", minutes=5)  # a first collective waits for half a minute only
    own = np.frombuffer(text.encode(), np.uint8)
    lengths = multihost_utils.process_allgather(np.array([len(own)], np.int32)).reshape(-1)
    padded = np.zeros(int(lengths.max()) or 1, np.uint8)
    padded[: len(own)] = own
    parts = multihost_utils.process_allgather(padded).reshape(len(lengths), -1)
    return [bytes(part[:length]).decode() for part, length in zip(parts, lengths, strict=True)]


def together(name: str, do: Callable[[], T]) -> T:
    """`do()` in every process; what is a `UserError` in one of them is one in all, which so end within seconds.

    The others say whose it was. Nothing that `do` calls may wait for other processes.
    """
    result, problem = None, ""
    try:
        result = do()
    except UserError as error:
        problem = str(error) or type(error).__name__
    said = [json.loads(one) for one in gather_texts(name, json.dumps([socket.gethostname(), problem]))]
    if problem:
        raise UserError(problem)
    for number, (host, other) in enumerate(said):
        if other:
            raise UserError(f"process {number} of {len(said)} on {host} cannot go on: {other}")
    return cast(T, result)


def check_agreement(name: str, own: Mapping[str, Any]) -> None:
    """`UserError`, in all processes, where their facts differ: the first difference of each with process 0.

    Args:
        name: of the barrier that they meet at.
        own: flat, of JSON values: `{"optimizer.learning_rate": 0.001, ...}`.
    """
    said = [json.loads(text) for text in gather_texts(name, json.dumps([socket.gethostname(), dict(own)]))]
    (host_0, first), problems = said[0], []
    for number, (host, facts) in enumerate(said):
        if keys := [key for key in {**first, **facts} if first.get(key) != facts.get(key)]:
            key, more = keys[0], f" (and {len(keys) - 1} more)" if len(keys) > 1 else ""
            there, here = facts.get(key), first.get(key)
            problems.append(f"process {number} on {host} has {key} = {there}, process 0 on {host_0} has {here}{more}")
    if problems:
        raise UserError(
            f"the {len(said)} processes of this run do not run the same: {'; '.join(problems[:4])}. Start all of them with the "
            "same command, code, packages and data"
        )


@dataclass(frozen=True)
class DeviceRow:
    """What one process has. `memory`: bytes that JAX may use of each device, None where it does not say; `promised`: GPUs
    that the scheduler gave it, by `source`, None where it says nothing."""

    process: int
    host: str
    platform: str
    kinds: str
    devices: int
    memory: int | None
    promised: int | None
    source: str


def own_row(environment: Mapping[str, str]) -> DeviceRow:
    """The row of this process."""
    local = jax.local_devices()
    kinds = ", ".join(sorted({device.device_kind for device in local}))
    memory = (local[0].memory_stats() or {}).get("bytes_limit")
    host, promise = socket.gethostname()[:128], promised_gpus(environment)
    return DeviceRow(jax.process_index(), host, local[0].platform, kinds[:128], len(local), memory, *promise)


def promised_gpus(environment: Mapping[str, str]) -> tuple[int | None, str]:
    """How many GPUs this process was given, and who says so; None where nobody does or the CPU is wanted."""
    platforms = environment.get("JAX_PLATFORMS", "")
    if platforms and not {"cuda", "gpu", "rocm"} & set(platforms.split(",")):
        return None, ""
    if "SLURM_PROCID" in environment:
        gpus = slurm_gpus(environment)
        return None if gpus is None else len(gpus), "SLURM's allocation"
    visible, tasks = visible_gpus(environment), _count(environment, "OMPI_COMM_WORLD_LOCAL_SIZE")
    return visible // tasks if visible else None, "CUDA_VISIBLE_DEVICES"


def check_devices(expected: int | None, environment: Mapping[str, str], cluster: str | None = None) -> None:
    """Shows which devices each process has; `UserError`, in all processes alike, where they are not those expected.

    Args:
        expected: devices of each process (`--expected-devices`). None: what the scheduler gave. A task that was given
            GPUs and runs on the CPU, or on one GPU of eight, is the classic silent waste of a cluster.
        environment: of this process.
        cluster: who said that this process belongs to a run; "tpu" must have TPUs.
    """
    counts = _count_devices()
    if expected is None and len(set(counts)) > 1:
        listed = ", ".join(f"{count} in process {process}" for process, count in enumerate(counts[:64]))
        raise UserError(f"every process must have the same number of devices, but there are {listed}. {CAUSES}")
    if expected is not None and any(count != expected for count in counts):
        wrong = {process: count for process, count in enumerate(counts) if count != expected}
        first, count = next(iter(wrong.items()))
        others = f" ({len(wrong)} such processes: {list(wrong)[:16]})" if len(wrong) > 1 else ""
        kind = jax.devices()[0].device_kind
        raise UserError(
            f"process {first} of {len(counts)} sees {count} device(s) ({kind}), but --expected-devices says {expected}"
            f"{others}. {CAUSES}"
        )
    rows = gather_rows(own_row(environment))
    if len(rows) > 1:
        mine = rows[jax.process_index()]
        logger.info(f"process {mine.process} of {len(rows)}: {mine.devices} x {mine.kinds}, {sum(counts)} in all")
        if jax.process_index() == 0:
            logger.info(device_table(rows))
    wanted = cluster if "JAX_PLATFORMS" not in environment else None
    if problems := [problem for row in rows if (problem := _row_problem(row, len(rows), expected, wanted))]:
        more = f"; and {len(problems) - 4} more processes" if len(problems) > 4 else ""
        raise UserError("; ".join(problems[:4]) + f"{more}. {CAUSES}")


CAUSES = (
    "Usual causes: a JAX without support for the accelerator (pip install 'jax[cuda13]' or 'jax[tpu]'), a task bound to one "
    "GPU of its node (--gpus-per-task, --gpu-bind), or CUDA_VISIBLE_DEVICES. To use fewer on purpose set "
    "MG3D_EXPECTED_DEVICES; to use the CPU set JAX_PLATFORMS=cpu"
)


def _row_problem(row: DeviceRow, processes: int, expected: int | None, cluster: str | None) -> str | None:
    sees = f"process {row.process} of {processes} on {row.host} sees {row.devices} device(s) ({row.kinds})"
    if cluster == "tpu" and row.platform != "tpu":
        return f"{sees}, but it was started as part of a TPU slice"
    if expected is None and row.promised is not None and (row.devices != row.promised or row.platform != "gpu"):
        return f"{sees}, but {row.source} says {row.promised} GPU(s)"
    return None


def _count_devices() -> list[int]:
    """Devices of every process, known to all of them."""
    try:
        found = Counter(device.process_index for device in jax.devices())
    except RuntimeError as error:
        raise UserError(
            f"JAX cannot list the devices: {error}. With several processes: does each of them have the accelerator? One "
            "that falls back to the CPU lets the others wait in vain"
        ) from error
    return [found[process] for process in range(jax.process_count())]


def gather_rows(row: DeviceRow) -> list[DeviceRow]:
    """The rows of all processes, in all processes. They must have equally many devices."""
    return [DeviceRow(**json.loads(text)) for text in gather_texts("devices", json.dumps(asdict(row)))]


def device_table(rows: Sequence[DeviceRow]) -> str:
    """One line per process: number, host, platform, devices, memory of each."""
    heading = ("process", "host", "platform", "devices", "memory of each")
    cells = [heading]
    for row in rows:
        memory = "not known" if row.memory is None else f"{row.memory / 2**30:.1f} GiB"
        cells.append((str(row.process), row.host, row.platform, f"{row.devices} x {row.kinds}", memory))
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in cells)

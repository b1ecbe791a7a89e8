"""Joins the processes of one run.

JAX recognises SLURM, TPU pods, GKE/JobSet and Open MPI by their environment; elsewhere the coordinator is given on the
command line or in `MG3D_COORDINATOR`, `MG3D_PROCESS_ID`, `MG3D_NUM_PROCESSES` (what `launch/local.sh` sets).
"""

from __future__ import annotations

import argparse
import os

import jax

from mg3d_jax.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("several processes (recognised by themselves on SLURM, TPU, GKE, Open MPI)")
    environment = os.environ.get
    group.add_argument("--coordinator", default=environment("MG3D_COORDINATOR"), metavar="HOST:PORT")
    group.add_argument("--process-id", type=int, default=environment("MG3D_PROCESS_ID"))
    group.add_argument("--num-processes", type=int, default=environment("MG3D_NUM_PROCESSES"))


def initialize(args: argparse.Namespace) -> None:
    """Must run before the first use of a device. One process needs nothing."""
    given = [args.coordinator, args.process_id, args.num_processes]
    if any(v is not None for v in given):
        if None in given:
            raise UserError("give all of --coordinator HOST:PORT, --process-id and --num-processes, or none")
        if not 0 <= args.process_id < args.num_processes:
            raise UserError(f"--process-id {args.process_id} is not in 0..{args.num_processes - 1}")
        if args.num_processes > 1:
            jax.distributed.initialize(args.coordinator, args.num_processes, args.process_id)
        return
    environment = os.environ
    slurm = int(environment.get("SLURM_NTASKS", "1")) > 1 and "SLURM_PROCID" in environment
    several_tpu_hosts = "," in environment.get("TPU_WORKER_HOSTNAMES", "") or "MEGASCALE_COORDINATOR_ADDRESS" in environment
    open_mpi = int(environment.get("OMPI_COMM_WORLD_SIZE", "1")) > 1
    if slurm or several_tpu_hosts or open_mpi:
        jax.distributed.initialize()

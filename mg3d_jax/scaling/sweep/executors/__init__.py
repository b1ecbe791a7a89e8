"""Where the runs of a sweep are trained. An executor is one file here and one line below."""

from mg3d_jax.registry import EXECUTORS
from mg3d_jax.scaling.sweep.executors.command import Command
from mg3d_jax.scaling.sweep.executors.local import Local
from mg3d_jax.scaling.sweep.executors.slurm import Slurm

EXECUTORS.register("local", Local)
EXECUTORS.register("slurm", Slurm)
EXECUTORS.register("command", Command)

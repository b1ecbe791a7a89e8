"""`mg3d bench WHAT`: the table of benchmarks; each is a module of `benchmarks`."""

from __future__ import annotations

import importlib
import sys

BENCHMARKS = {
    "data": (
        "mg3d_jax.benchmarks.preparation",
        "preparation and loading, beside the usual script and MONAI's PersistentDataset",
    ),
    "model": ("mg3d_jax.benchmarks.towers", "a volume encoder's training step, beside MONAI's ViT in PyTorch"),
    "step": ("mg3d_jax.benchmarks.step", "a training step: its time by part, memory, FLOPs, collectives"),
    "segmentation": (
        "mg3d_jax.benchmarks.segmentation",
        "a step and sliding-window inference of UNETR, beside MONAI's in PyTorch",
    ),
    "memory": ("mg3d_jax.benchmarks.memory", "how many patients fit on a device: the step, compiled and not run"),
    "hounsfield": ("mg3d_jax.benchmarks.hounsfield", "what the reader makes of CT that is stored in every way"),
    "objectives": ("mg3d_jax.benchmarks.objectives", "compiled memory of sentence matching, blocked and dense"),
    "reports": ("mg3d_jax.benchmarks.reports", "language and labels of phantoms beside those of real reports"),
}


def main(argv: list[str]) -> int:
    """Runs one benchmark with the rest of the arguments."""
    if argv and argv[0] in BENCHMARKS:
        return importlib.import_module(BENCHMARKS[argv[0]][0]).main(argv[1:]) or 0
    rows = "\n".join(f"  {name:<13} {summary}" for name, (_, summary) in BENCHMARKS.items())
    text = f"usage: mg3d bench WHAT [options]\n\nwhat:\n{rows}\n\nmg3d bench WHAT --help says more."
    wanted = not argv or argv[0] in ("-h", "--help")
    print(
        text if wanted else f"mg3d bench: there is no benchmark {argv[0]!r}.\n\n{text}",
        file=None if wanted else sys.stderr,
    )
    return 0 if wanted else 2

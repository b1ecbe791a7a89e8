"""`mg3d <command>`: one table of commands, each in its own module with `main(argv) -> int` and its own `--help`.

Modules are imported only when their command runs, so that `mg3d --help` and `mg3d phantom` never import JAX.
"""

from __future__ import annotations

import importlib
import logging
import sys

from mg3d_jax import log
from mg3d_jax.errors import UserError, storage_problem

logger = logging.getLogger(__name__)

COMMANDS: dict[str, tuple[str, str]] = {
    "phantom": ("mg3d_jax.commands.phantom", "make procedural chest CT with reports, in CT-RATE's layout"),
    "prepare": ("mg3d_jax.commands.prepare", "volumes and reports on disk -> checked, sharded training records"),
    "train": ("mg3d_jax.commands.train", "train from a config; the same command resumes"),
    "report": ("mg3d_jax.commands.report", "one HTML page of a run: curves, slices, evaluations, configuration"),
    "evaluate": ("mg3d_jax.commands.evaluate", "zero-shot AUROC and retrieval of a trained run"),
    "attend": ("mg3d_jax.evaluation.attend", "where in a scan a sentence looks: NIfTI map and overlay"),
    "sweep": ("mg3d_jax.commands.sweep", "scaling-law sweeps: plan, run, status, fit"),
    "import": ("mg3d_jax.commands.import_", "read published weights: BERT types, MONAI's ViT and Swin"),
    "export": ("mg3d_jax.interop.export", "write a run's weights for PyTorch and Hugging Face users"),
    "bench": ("mg3d_jax.commands.bench", "measure data, model and objectives on this machine"),
}


def usage() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {summary}" for name, (_, summary) in COMMANDS.items()]
    commands = "\n".join(lines)
    return (
        f"usage: mg3d [-v] <command> [options]\n\ncommands:\n{commands}\n\nmg3d <command> --help says more. "
        f"-v, --verbose, or {log.LEVEL_VARIABLE}=debug in the environment: every message; {log.LEVEL_VARIABLE}=warning: fewer."
    )


def main(argv: list[str] | None = None) -> int:
    """Runs one command; a `UserError` becomes one readable line on stderr and exit code 2."""
    argv = sys.argv[1:] if argv is None else argv
    verbose = argv[:1] in (["-v"], ["--verbose"])
    name, *rest = (argv[1:] if verbose else argv) or ["--help"]
    if name in ("-h", "--help", "help"):
        print(usage())
        return 0
    if name == "--version":
        from mg3d_jax import __version__

        print(f"mg3d {__version__}")
        return 0
    try:
        log.to_stderr("debug" if verbose else None)
        if name not in COMMANDS:
            raise UserError(f"there is no command {name!r}.\n\n{usage()}")
        return importlib.import_module(COMMANDS[name][0]).main(rest) or 0
    except UserError as error:
        logger.error("mg3d%s: %s", f" {name}" if name in COMMANDS else "", error)
        return 2
    except OSError as error:
        if (problem := storage_problem(error)) is None:
            raise
        where = f"{error.filename}: " if error.filename else ""
        logger.error(
            "mg3d %s: %s%s. Make room or change the permissions; the same command goes on", name, where, problem
        )
        return 2

"""`mg3d train`: train from a config; the same command resumes."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mg3d_jax import config as config_lib
from mg3d_jax.config import Config
from mg3d_jax.training import distributed

if TYPE_CHECKING:
    from mg3d_jax.training.hooks import Hook
    from mg3d_jax.training.loop import Trainer


def trainer(config: Config, workdir: Path, *, hooks: Sequence[Hook] = (), profile_steps: int = 0) -> Trainer:
    """The trainer of `mg3d train`: with the evaluations and pictures that the config asks for, and further `hooks`."""
    # Imported after the processes of a run have joined: what is imported may look for devices.
    from mg3d_jax.evaluation.hooks import DrawReconstructions, Evaluate
    from mg3d_jax.interop.warm_start import load_pretrained
    from mg3d_jax.training.loop import Trainer

    own: list[Hook] = []
    if config.data.valid and config.objectives["volume_reconstruction"].weight > 0:
        own.append(DrawReconstructions(config.training.validate_every))
    if config.data.valid and config.training.evaluate_every:
        own.append(Evaluate(config.training.evaluate_every))
    return Trainer(config, workdir, hooks=[*own, *hooks], initialize=load_pretrained, profile_steps=profile_steps)


def main(argv: list[str]) -> int:
    """The command. Returns 75 where the run was stopped with everything saved."""
    parser = argparse.ArgumentParser(
        prog="mg3d train",
        description="Trains from a config. The same command again resumes from the newest checkpoint. Exit code 75 means: "
        "stopped by SIGTERM with everything saved, run me again.",
    )
    config_lib.add_arguments(parser)
    parser.add_argument("--workdir", required=True, type=Path, help="where checkpoints, metrics and the tokenizer go")
    parser.add_argument(
        "--profile",
        type=int,
        default=0,
        metavar="N",
        help="writes a trace of N steps, once the first are over, into WORKDIR/profile",
    )
    distributed.add_arguments(parser)
    args, config = config_lib.parse(parser, argv)
    distributed.initialize(args)
    return trainer(config, args.workdir, profile_steps=args.profile).run()

"""`mg3d train`: train from a config; the same command resumes."""

from __future__ import annotations

import argparse
from pathlib import Path

from mg3d_jax import config as config_lib
from mg3d_jax.training import distributed


def main(argv: list[str]) -> int:
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
    from mg3d_jax.training.loop import Trainer  # after the processes have joined

    return Trainer(config, args.workdir, profile_steps=args.profile).run()

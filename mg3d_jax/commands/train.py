"""`mg3d train`: train from a config; the same command resumes."""

from __future__ import annotations

import argparse
from pathlib import Path

from mg3d_jax import config as config_lib
from mg3d_jax.training import distributed


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
    parser.add_argument(
        "--init-from",
        metavar="PATH",
        help="start from a run (RUN or RUN@STEP), a folder of `mg3d import` or of `mg3d export`; short for "
        "--config.init_from.path=PATH",
    )
    distributed.add_arguments(parser)
    overrides, own = config_lib.split_overrides(argv)
    args = parser.parse_args(own)
    start = [f"--config.init_from.path={args.init_from}"] if args.init_from else []
    config = config_lib.load(args.config, overrides + start)
    with distributed.joined(args):
        from mg3d_jax.trainer import Trainer  # after the processes have joined: nothing may look for devices before

        return distributed.ended(Trainer(config, args.workdir, profile_steps=args.profile).run())

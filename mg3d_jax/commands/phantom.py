"""`mg3d phantom OUT --patients N --valid M --seed S [--style plain]`: procedural chest CT with reports, in CT-RATE's layout."""

from __future__ import annotations

import argparse
from pathlib import Path

from mg3d_jax.errors import UserError
from mg3d_jax.phantom.dataset import make
from mg3d_jax.phantom.patients import STYLE, STYLES


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="mg3d phantom",
        description="Make procedural chest CT patients (volumes, reports, metadata, 18 labels) in CT-RATE's layout. "
        "Patient k of a seed is the same, byte for byte, whatever --patients and --workers are.",
    )
    parser.add_argument("out", type=Path, help="folder to write; new, empty, or an earlier run of the same command")
    parser.add_argument("--patients", type=int, default=200, help="patients of the train split (default %(default)s)")
    parser.add_argument("--valid", type=int, default=50, help="patients of the valid split (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of everything random (default %(default)s)")
    parser.add_argument(
        "--style",
        choices=tuple(STYLES),
        default=STYLE,
        help="clinical: labels and report language with the statistics of CT-RATE's; plain: independent labels, each in "
        "about a quarter of the scans, and short sentences (what version 0.1.0 wrote) (default %(default)s)",
    )
    parser.add_argument("--workers", type=int, default=None, help="processes (default: one per CPU core)")
    return parser


def main(argv: list[str]) -> int:
    """The command; `UserError` where `out` holds something else or cannot be written."""
    args = _parser().parse_args(argv)
    try:
        volumes = make(args.out, args.patients, args.valid, args.seed, args.workers, args.style)
    except OSError as error:
        raise UserError(
            f"cannot write {args.out}: {error}. The same command goes on from here once that is repaired."
        ) from error
    what = f"{args.patients} train and {args.valid} valid {args.style} patients of seed {args.seed}"
    print(f"{args.out}: {what}, {volumes} volumes" if volumes else f"{args.out}: already holds {what}; nothing to do")
    return 0

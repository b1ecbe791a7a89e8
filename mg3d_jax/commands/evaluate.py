"""`mg3d evaluate`: the registered evaluations of a trained run on prepared data."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from mg3d_jax.evaluation.base import sections
from mg3d_jax.files import write_json


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="mg3d evaluate",
        description="Evaluates a run: zero-shot AUROC of the labelled abnormalities, recall@k between volumes and reports, "
        "and evaluations of your own. Writes evaluation.json and evaluation.png.",
    )
    parser.add_argument("--workdir", required=True, type=Path, help="a run of `mg3d train`")
    parser.add_argument("--data", required=True, nargs="+", help="prepared folder(s), not used in training")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these evaluations (default: all)")
    parser.add_argument("--step", type=int, help="which checkpoint (default: the newest)")
    parser.add_argument("--out", type=Path, help="where to write (default: WORKDIR/evaluation)")
    parser.add_argument("--batch-size", type=int, default=16, help="volumes per call (default: %(default)s)")
    parser.add_argument(
        "--raw-weights",
        action="store_true",
        help="of a run with optimizer.ema: the weights themselves, not their average",
    )
    args = parser.parse_args(argv)
    if args.batch_size < 1:
        parser.error(f"--batch-size {args.batch_size}: must be at least 1")
    from mg3d_jax.api import load  # imports JAX
    from mg3d_jax.evaluation.evaluate import plot

    run = load(args.workdir, args.step, ema=False if args.raw_weights else None)
    result = run.evaluate(args.data, only=args.only, batch_size=args.batch_size)
    out = args.out or args.workdir / "evaluation"
    out.mkdir(parents=True, exist_ok=True)
    written = [out / "evaluation.json", out / "evaluation.png"]
    write_json(written[0], result, allow_nan=True)
    drawn = plot(result, written[1])
    print_tables(result)
    print(f"written: {', '.join(map(str, written if drawn else written[:1]))}")
    return 0


def print_tables(result: Mapping[str, Any]) -> None:
    """A table for each evaluation on stdout."""
    console = Console()
    console.print(f"{result['volumes']} volumes of {result['patients']} patients")
    for section in [one for one in sections(result) if one.on_terminal]:
        # A drawn interval has a heading, but no text in its row.
        columns = len(section.table.head) - bool(section.table.intervals)
        style = {"title_justify": "left", "caption_justify": "left"}
        table = Table(*map(str, section.table.head[:columns]), title=section.title, caption=section.protocol, **style)
        for row in section.table.rows:
            table.add_row(*map(str, row))
        console.print(table)
        if section.table.more:
            console.print(section.table.more)
        for warning in section.warnings:
            console.print(f"! {warning}", highlight=False)

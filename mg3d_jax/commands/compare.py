"""`mg3d compare`: two models, or two recipes with several seeds each, on the same patients."""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.console import Console
from rich.table import Table

from mg3d_jax.evaluation.compare import Comparison, compare
from mg3d_jax.files import write_json


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="mg3d compare",
        description="The difference of every metric that two evaluated models have, with a 95 % interval by a paired bootstrap "
        "over patients. A run is a folder that `mg3d evaluate` evaluated, one that it wrote, or a scores.npz.",
    )
    parser.add_argument("runs", nargs="*", type=Path, metavar="RUN", help="RUN_A RUN_B")
    parser.add_argument(
        "--a", nargs="+", type=Path, default=[], metavar="RUN", help="several seeds of the first recipe"
    )
    parser.add_argument("--b", nargs="+", type=Path, default=[], metavar="RUN", help="several seeds of the second")
    parser.add_argument("--classes", action="store_true", help="show the metrics of single classes, too")
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="write all differences to this file")
    args = parser.parse_args(argv)
    if args.runs and (args.a or args.b):
        parser.error("give RUN_A RUN_B, or --a RUN ... --b RUN ...")
    if not args.a and not args.b and len(args.runs) == 2:
        args.a, args.b = [args.runs[0]], [args.runs[1]]
    if not args.a or not args.b:
        parser.error("two sides are needed: RUN_A RUN_B, or --a RUN ... --b RUN ...")
    found = compare(args.a, args.b)
    print_table(found, classes=args.classes)
    if args.out is not None:
        write_json(args.out, found.to_json(), allow_nan=True)
        print(f"written: {args.out}")
    return 0


def print_table(found: Comparison, *, classes: bool = False) -> None:
    """The differences on stdout, grouped by protocol; where an interval leaves 0 out, which side is better."""
    console = Console()
    console.print(f"a: {', '.join(found.a)}\nb: {', '.join(found.b)}\n{found.patients} patients", highlight=False)
    groups: dict[str, list[str]] = {}
    for key in found.metrics:
        protocol, _, metric = key.rpartition("/")
        of_class = protocol.rpartition("/")[2] in _by_class(found)
        if not of_class or classes:
            groups.setdefault(protocol, []).append(metric)
    for protocol, metrics in groups.items():
        table = Table("", "a", "b", "b - a", "95 % interval", "better", title=protocol, title_justify="left")
        for metric in metrics:
            one = found.metrics[f"{protocol}/{metric}"]
            low, high = one["difference_95"]
            numbers = (f"{one['a']:.3f}", f"{one['b']:.3f}", f"{one['difference']:+.3f}", f"{low:+.3f} to {high:+.3f}")
            table.add_row(metric, *numbers, one["better"])
        console.print(table)
    decided = sum(bool(one["better"]) for one in found.metrics.values())
    console.print(
        f"{decided} of {len(found.metrics)} intervals leave 0 out; of two equal models about one in twenty would.",
        highlight=False,
    )
    for side, keys in found.only_in.items():
        if keys:
            console.print(f"only {side} has: {len(keys)} metrics, e.g. {keys[0]}", highlight=False)
    for note in found.notes:
        console.print(f"! {note}", highlight=False)


def _by_class(found: Comparison) -> set[str]:
    """Names of metrics that have a value for each class: `auroc` where there is `auroc_macro`."""
    names = {key.rpartition("/")[2] for key in found.metrics}
    return {name.removesuffix("_macro") for name in names if name.endswith("_macro")}

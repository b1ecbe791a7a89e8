"""`mg3d sweep plan | run | status | compare`, and what `sweep_fit.py` and `sweep_advice.py` add: sweeps over size, data or
variants."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from mg3d_jax.commands import sweep_advice, sweep_fit
from mg3d_jax.errors import UserError

if TYPE_CHECKING:
    from mg3d_jax.scaling.sweep.declaration import Sweep


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="mg3d sweep", description="Sweeps over size, data or variants: declare, train, fit laws, compare."
    )
    commands = top.add_subparsers(dest="command", required=True)
    _add_plan(commands)
    _add_run(commands)
    status = commands.add_parser(
        "status", help="where every declared run stands", description="Where every run stands."
    )
    status.add_argument("--workdir", type=Path, required=True, help="the sweep's folder")
    status.add_argument(
        "--watch",
        nargs="?",
        type=float,
        const=5.0,
        metavar="SECONDS",
        help="look again every so many seconds (5) until all are done: a live table on a terminal, lines elsewhere",
    )
    sweep_fit.add_parser(commands)
    sweep_advice.add_parsers(commands)
    _add_compare(commands)
    return top


def _add_plan(commands: argparse._SubParsersAction) -> None:
    command = _add_declared(
        commands, "plan", "print the runs, what they cost, and what `run` would do; changes nothing"
    )
    speed = command.add_mutually_exclusive_group()
    speed.add_argument(
        "--flops-per-second", type=float, metavar="X", help="of one device, as measured (mg3d bench step)"
    )
    speed.add_argument("--device", metavar="NAME", help="instead: a device by name, e.g. H100 or 'TPU v5p'")
    command.add_argument(
        "--utilisation", type=float, default=0.3, metavar="SHARE", help="of its peak that is reached (default 0.3)"
    )
    command.add_argument("--devices", type=int, default=1, metavar="K", help="that each run has (default 1)")
    command.add_argument(
        "--noise", type=float, default=0.003, metavar="SHARE",
        help="of the loss, between runs that differ in their seeds only (default 0.003)",
    )  # fmt: skip


def _add_run(commands: argparse._SubParsersAction) -> None:
    run = _add_declared(
        commands,
        "run",
        "train the runs until all are done; the same command goes on after any interruption, also beside another one. "
        "Exit code 0 when all are done, 1 when some failed for good, 75 when asked to stop",
    )
    run.add_argument(
        "--executor", default="local", metavar="NAME", help="where they are trained: local (default), slurm, command"
    )
    run.add_argument("--at-once", type=int, default=1, metavar="K", help="runs that are trained at a time (default 1)")
    run.add_argument(
        "--option",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="of the executor; may be repeated. slurm: parameters of submitit, e.g. partition=gpu, nodes=2; command: "
        "command='LINE OF SHELL with {command}', detached=true, alive='LINE OF SHELL'",
    )
    run.add_argument(
        "--retries", type=int, default=1, metavar="N", help="how often a run that fails is tried again (default 1)"
    )


def _add_declared(commands: argparse._SubParsersAction, name: str, summary: str) -> argparse.ArgumentParser:
    command = commands.add_parser(name, help=summary, description=f"{summary[0].upper()}{summary[1:]}.")
    command.add_argument(
        "--config", required=True, metavar="FILE[:ARG]", help="sweep file, e.g. configs/sweeps/quickstart.py"
    )
    command.add_argument("--workdir", type=Path, required=True, help="the sweep's folder: runs/ID, sweep.json, fit/")
    command.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        dest="settings",
        help="overrides a key of every run's training config, e.g. --set data.train=RUN/train; may be repeated",
    )
    return command


def _add_compare(commands: argparse._SubParsersAction) -> None:
    command = commands.add_parser(
        "compare",
        help="table of variants with intervals over seeds (ablations)",
        description="Final metrics of every variant: mean and 95 % interval over seeds, and the paired difference to the "
        "first variant. Writes compare.json, .csv, .md and .png.",
    )
    command.add_argument("--workdir", type=Path, required=True, help="the sweep's folder")
    command.add_argument(
        "--metric",
        action="append",
        default=[],
        help="metric of summary.json; may be repeated (default: those of zero-shot, "
        "recall@10, probes, fine-tuning and masked losses that there are)",
    )
    command.add_argument("--out", type=Path, help="folder for the results (default: WORKDIR/compare)")


def main(argv: list[str]) -> int:
    """Runs one subcommand; the exit code is 0 if it did what it was asked."""
    args = parser().parse_args(argv)
    commands = {"plan": _plan, "run": _run, "status": _status, "compare": _compare}
    laws = {name: getattr(sweep_advice, name) for name in ("advise", "predict", "check")}
    return (commands | {"fit": sweep_fit.fit} | laws)[args.command](args)


def _plan(args: argparse.Namespace) -> int:
    from mg3d_jax.devices import leave_accelerators_alone

    leave_accelerators_alone()
    from mg3d_jax.scaling.sweep import collect, declaration, plan
    from mg3d_jax.scaling.sweep.speed import Speed

    if min(args.utilisation, args.devices, args.noise, args.flops_per_second or 1) <= 0 or args.utilisation > 1:
        raise UserError("--utilisation is a share up to 1; --devices, --noise and --flops-per-second are above 0")
    declared = declaration.load(args.config, args.settings, args.workdir)
    speed: Speed | None
    if args.device:
        speed = Speed.named(args.device, args.utilisation, args.devices)
    elif args.flops_per_second:
        source = f"{args.flops_per_second / 1e12:g} TFLOP/s"
        speed = Speed.of_devices(args.flops_per_second, args.devices, source)
    else:
        speed = Speed.measured(collect.records(args.workdir, declared))
    planned = plan.plan(declared, args.workdir, speed)
    print(plan.plan_table(declared, planned, speed))
    print(plan.precision_text(declared, planned, args.noise))
    return 0


def _run(args: argparse.Namespace) -> int:
    from mg3d_jax.devices import leave_accelerators_alone

    leave_accelerators_alone()
    from mg3d_jax.registry import EXECUTORS
    from mg3d_jax.scaling.sweep import declaration, plan, runner

    if args.retries < 0:
        raise UserError(f"--retries {args.retries}: it must be 0 or more")
    if wrong := [option for option in args.option if "=" not in option]:
        raise UserError(f"--option {wrong[0]}: write KEY=VALUE")
    options = dict(option.split("=", 1) for option in args.option)
    executor = EXECUTORS[args.executor](options, at_once=args.at_once)
    declared = declaration.load(args.config, args.settings, args.workdir)
    planned = plan.plan(declared, args.workdir)
    print(plan.plan_table(declared, planned), flush=True)
    if any(one.records is None for one in planned):
        raise UserError("data.train or data.valid is not a prepared folder (no manifest.json): run mg3d prepare first")
    declared = dataclasses.replace(declared, data=declaration.data_fingerprint(declared))
    declaration.write_declaration(args.workdir, declared)
    return runner.run_all(declared, args.workdir, executor=executor, retries=args.retries)


def _status(args: argparse.Namespace) -> int:
    from mg3d_jax.scaling.sweep import board, declaration

    declared = declaration.read_declaration(args.workdir)
    if args.watch is None:
        print(board.text(args.workdir, declared, board.look(args.workdir, declared)))
        return 0
    if args.watch <= 0:
        raise UserError(f"--watch {args.watch}: seconds above 0")
    with contextlib.suppress(KeyboardInterrupt):
        _watch(args.workdir, declared, args.watch)
    return 0


def _watch(workdir: Path, declared: Sweep, seconds: float) -> None:
    """Shows where the runs stand until all are done."""
    from rich.console import Console
    from rich.live import Live

    from mg3d_jax.scaling.sweep import board, states

    console, before = Console(), ""
    live = Live(console=console, auto_refresh=False) if console.is_terminal else None
    with live or contextlib.nullcontext():
        while True:
            lines = board.look(workdir, declared)
            if live is not None:
                live.update(board.table(declared, lines), refresh=True)
            elif (now := board.log_line(lines)) != before:
                print(now, flush=True)
                before = now
            if all(line.state == states.DONE for line in lines):
                return
            time.sleep(seconds)


def _compare(args: argparse.Namespace) -> int:
    from mg3d_jax.scaling.sweep import compare, declaration

    declared = declaration.read_declaration(args.workdir)
    found, missing = compare.finals(args.workdir, declared)
    metrics = compare.columns(found, declared, args.metric)
    rows = compare.compare(found, metrics)
    out = args.out or args.workdir / "compare"
    names = compare.write(out, rows, metrics)
    print(compare.markdown(rows, metrics))
    if missing:
        print(f"not done, left out: {', '.join(missing)}", file=sys.stderr)
    print(f"wrote {out}/" + ", ".join(names))
    return 0

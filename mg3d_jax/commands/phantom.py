"""`mg3d phantom OUT`: procedural chest CT with reports in CT-RATE's layout, or a miniature of another data set."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from mg3d_jax.errors import UserError
from mg3d_jax.phantom.dataset import make
from mg3d_jax.phantom.layouts.base import make_miniature
from mg3d_jax.phantom.patients import STYLE, STYLES
from mg3d_jax.registry import LAYOUTS

_CT_RATE = "ctrate"
_DEFAULTS: dict[str, Any] = {"patients": 200, "valid": 50, "style": STYLE, "workers": None}  # of CT-RATE's layout


def _parser() -> argparse.ArgumentParser:
    layouts = "; ".join(f"{name}: {layout.summary}" for name, layout in LAYOUTS.items())
    parser = argparse.ArgumentParser(
        prog="mg3d phantom",
        description="Make procedural chest CT patients (volumes, reports, metadata, 18 labels) in CT-RATE's layout. "
        "Patient k of a seed is the same, byte for byte, whatever --patients and --workers are. With --layout: a small "
        "procedural data set in the layout of another one.",
    )
    add = parser.add_argument
    add("out", type=Path, help="folder to write; new, empty, or an earlier run of the same command")
    add(
        "--layout",
        default=_CT_RATE,
        choices=(_CT_RATE, *LAYOUTS),
        help=f"of which data set (default {_CT_RATE}); {layouts}",
    )
    add("--patients", type=int, help=f"patients of the train split (default {_DEFAULTS['patients']}, or the layout's)")
    add("--valid", type=int, help=f"ctrate: patients of the valid split (default {_DEFAULTS['valid']})")
    add("--seed", type=int, default=0, help="of everything random (default %(default)s)")
    add(
        "--style",
        choices=tuple(STYLES),
        help="ctrate: clinical: labels and report language with the statistics of CT-RATE's; plain: independent labels, "
        f"each in about a quarter of the scans, and short sentences (what version 0.1.0 wrote) (default {STYLE})",
    )
    add("--workers", type=int, help="ctrate: processes (default: one per CPU core)")
    return parser


def main(argv: list[str]) -> int:
    """The command; `UserError` where `out` holds something else or cannot be written."""
    args = _parser().parse_args(argv)
    try:
        print(_ct_rate(args) if args.layout == _CT_RATE else _miniature(args))
    except OSError as error:
        raise UserError(
            f"cannot write {args.out}: {error}. The same command goes on from here once that is repaired."
        ) from error
    return 0


def _ct_rate(args: argparse.Namespace) -> str:
    given = {name: getattr(args, name) for name in _DEFAULTS}
    patients, valid, style, workers = (given[n] if given[n] is not None else _DEFAULTS[n] for n in _DEFAULTS)
    volumes = make(args.out, patients, valid, args.seed, workers, style)
    what = f"{patients} train and {valid} valid {style} patients of seed {args.seed}"
    return f"{args.out}: {what}, {volumes} volumes" if volumes else f"{args.out}: already holds {what}; nothing to do"


def _miniature(args: argparse.Namespace) -> str:
    if idle := [f"--{name}" for name in ("valid", "style", "workers") if getattr(args, name) is not None]:
        raise UserError(f"{', '.join(idle)}: of --layout {_CT_RATE} only; {args.layout} has no such option")
    files = make_miniature(args.out, args.layout, args.patients, args.seed)
    what = f"a miniature of {args.layout}, seed {args.seed}"
    return f"{args.out}: {what}, {files} files" if files else f"{args.out}: already holds {what}; nothing to do"

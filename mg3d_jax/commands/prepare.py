"""`mg3d prepare`: volumes and reports on disk -> checked, sharded training records."""

from __future__ import annotations

import argparse
import dataclasses
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mg3d_jax.data.rad_chestct import MAPPINGS
from mg3d_jax.errors import UserError
from mg3d_jax.prepare import Settings, prepare, summary
from mg3d_jax.prepare.folder import dry_run
from mg3d_jax.prepare.geometry import POLICIES
from mg3d_jax.prepare.growth import COMPARE
from mg3d_jax.prepare.leaks import LEAKS
from mg3d_jax.prepare.selection import FILTERS, RECONSTRUCTIONS
from mg3d_jax.prepare.settings import source_defaults
from mg3d_jax.prepare.verify import verify
from mg3d_jax.registry import SOURCES, load_plugins

_SHOWN_FAULTS = 50


def _shard_share(text: str) -> tuple[int, int]:
    try:
        index, count = (int(part) for part in text.split("/"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not i/n, such as 0/8") from None
    return index, count


def _first(argv: list[str]) -> dict[str, Any]:
    """The settings that the source of a command line has of its own: before the other options are read. Imports the modules
    behind `--plugins`, whose sources `--source` may name."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--plugins", nargs="+", default=())
    first.add_argument("--source")
    args = first.parse_known_args(argv)[0]
    load_plugins(args.plugins)
    return source_defaults(args.source) if args.source is not None and args.source in SOURCES else {}


_XYZ: dict[str, Any] = {"nargs": 3, "metavar": ("X", "Y", "Z")}
_LOW_HIGH: dict[str, Any] = {"nargs": 2, "type": float, "metavar": ("LOW", "HIGH")}
_DEFAULT = {field.name: field.default for field in dataclasses.fields(Settings)}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="mg3d prepare",
        description="Reads CT volumes and reports, checks them, and writes sharded training records with a manifest, a "
        "quality record per volume (qa.jsonl) and a page to look at (qa.html). Started again it continues.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--source", choices=sorted(SOURCES), help="layout of the data set")
    add("--root", type=Path, help="folder of the data set; for csv, the table; for ctrg, the folder or its json")
    add(
        "--split",
        help="split of the data set: train, valid (ctrate), train, val, test (ctrg), any (csv); a wrong one names all",
    )
    add("--out", required=True, type=Path, help="folder for the records")
    add("--dry-run", action="store_true", help="only say what would be done, and why")
    add("--verify", action="store_true", help="only check the checksums and every record of --out")
    add("--plugins", nargs="+", default=(), metavar="MODULE", help="Python modules that register sources of your own")
    _add_grid(parser.add_argument_group("grid").add_argument)
    _add_selection(parser.add_argument_group("selection").add_argument)
    add = parser.add_argument_group("files that do not say it themselves (arrays, 8-bit slices)").add_argument
    add("--array-spacing", type=float, default=None, help="mm of the three index axes", **_XYZ)
    add("--array-axes", default=None, help="where the index axes point, such as LPS or SPL")
    add("--slice-window", default=None, help="HU of grey 0 and 255 of 8-bit slices", **_LOW_HIGH)
    _add_work(parser.add_argument_group("work").add_argument)
    return parser


def _add_grid(add: Callable[..., object]) -> None:
    policies = "; ".join(f"{name}: {text}" for name, text in POLICIES.items()).replace("%", "%%")
    add("--size", type=int, default=_DEFAULT["size"], help="voxels, RAS+", **_XYZ)
    add("--spacing", type=float, default=_DEFAULT["spacing"], help="mm per voxel", **_XYZ)
    add("--policy", choices=sorted(POLICIES), default=_DEFAULT["policy"], help=policies)
    add("--fraction", type=float, default=_DEFAULT["fraction"], help="shares for --policy fraction", **_XYZ)
    add("--window", default=None, help="store uint8 of this HU window instead of int16", **_LOW_HIGH)


def _add_selection(add: Callable[..., object]) -> None:
    add("--reconstructions", choices=RECONSTRUCTIONS, default="all", help="of one scan (ctrate)")
    filters = "; ".join(f"{name}: {text}" for name, text in FILTERS.items())
    add("--filter", dest="filters", nargs="+", default=(), choices=FILTERS, metavar="NAME", help=f"ctrate: {filters}")
    add("--label-mapping", choices=MAPPINGS, default=_DEFAULT["label_mapping"], help="rad-chestct: labels as CT-RATE's")
    modality = "mr: intensities are scaled by percentiles and never taken for HU"
    add("--modality", type=str.upper, choices=("CT", "MR"), default=_DEFAULT["modality"], help=modality)
    add("--exclude", type=Path, help="text file of volumes, scans or patients to leave out, one a line")
    add("--fold", type=_shard_share, default=None, metavar="I/N", help="this part of the patients only, I from 0")
    add("--fold-seed", type=int, default=_DEFAULT["fold_seed"], help="of the folds")
    add("--fold-file", type=Path, help="keeps the fold of every patient: written by the first, read by the others")
    add("--negatives", type=int, default=_DEFAULT["negatives"], help="luna16: kept of each scan; 0 keeps all")
    add("--max-bad-share", type=float, default=_DEFAULT["max_bad_share"], help="fail above this share")
    add("--against", type=Path, nargs="+", default=(), metavar="FOLDER", help="prepared folders to check for leaks")
    add("--allow-leak", nargs="+", default=(), choices=sorted(LEAKS), help="leaks that are meant, by name")


def _add_work(add: Callable[..., object]) -> None:
    add("--workers", type=int, default=len(os.sched_getaffinity(0)), help="worker processes")
    add("--shard", type=_shard_share, default=(0, 1), help="i/n: do every n-th shard from the i-th (from 0)")
    add("--shard-records", type=int, default=_DEFAULT["shard_records"], help="records per shard")
    add("--zstd-level", type=int, default=_DEFAULT["zstd_level"], help="0 stores uncompressed")
    fetch = "shell command that puts {name} into {dir}; {patient} {scan} {split} too"
    add("--fetch", default=None, metavar="CMD", help=fetch)
    compare = "by what a volume counts as changed since: size and time, size, or checksum (reads every volume)"
    add("--compare", choices=COMPARE, default=_DEFAULT["compare"], help=compare)
    add("--qa-samples", type=int, default=_DEFAULT["qa_samples"], help="volumes drawn in qa.html")


def _verify(folder: Path) -> None:
    faults = verify(folder)
    if faults:
        shown = faults[:_SHOWN_FAULTS]
        if len(faults) > len(shown):
            shown.append(f"and {len(faults) - len(shown):,} more")
        raise UserError(f"{folder} has {len(faults)} faults:\n  " + "\n  ".join(shown))
    print(f"{folder} is sound")


def main(argv: list[str]) -> int:
    """The command. Prints the summary; `UserError` when nothing is left, too much is bad, or data leak."""
    own = _first(argv)
    parser = _parser()
    parser.set_defaults(**own)
    arguments = vars(parser.parse_args(argv))
    del arguments["plugins"]
    if arguments.pop("verify"):
        _verify(arguments["out"])
        return 0
    if missing := [f"--{name}" for name in ("source", "root", "split") if arguments[name] is None]:
        raise UserError(f"{', '.join(missing)} missing; see mg3d prepare --help")
    values: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in arguments.items()
    }
    only_said = values.pop("dry_run")
    settings = Settings(**values)
    if only_said:
        print(dry_run(settings))
        return 0
    manifest = prepare(settings)
    if manifest is None:
        index, count = settings.shard
        print(f"share {index}/{count} is done; the last share to finish writes the manifest")
    else:
        print(summary(manifest))
    return 0

"""`mg3d probe`: linear probe, nearest neighbours and probes of few patients, of a run or of anybody's embeddings."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mg3d_jax import options as options_lib
from mg3d_jax.commands.evaluate import print_tables
from mg3d_jax.evaluation.document import OVERRIDE, Evaluated, configured
from mg3d_jax.evaluation.label_tables import MAPPINGS, mapping_of_each
from mg3d_jax.evaluation.probe import Probe
from mg3d_jax.evaluation.probes import HEAD_FILE, save_head
from mg3d_jax.evaluation.probes.linear import KINDS

SHORT = ("kind", "fractions", "seeds", "seed")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="mg3d probe",
        description="Fits probes to the embeddings of labelled volumes and scores others: a linear probe whose penalty is "
        "chosen on held-out patients, nearest neighbours, and linear probes of 1, 5, 10 and 100 % of the patients. Writes "
        f"what `mg3d evaluate` writes, and the linear probe as {HEAD_FILE}, for `mg3d export --probe`.",
        epilog=f"Every option can be set: {OVERRIDE}probe.KEY=VALUE (docs/configuration.md lists them).",
    )
    parser.add_argument(
        "--train",
        required=True,
        nargs="+",
        metavar="DATA",
        help="prepared folder(s) with --workdir, else one file of embeddings",
    )
    parser.add_argument("--test", required=True, nargs="+", metavar="DATA", help="the same, of other patients")
    parser.add_argument("--out", required=True, type=Path, help="folder to write")
    parser.add_argument("--workdir", type=Path, help="a run of `mg3d train`, which embeds the folders")
    parser.add_argument("--step", type=int, help="which checkpoint (default: the newest)")
    parser.add_argument("--batch-size", type=int, default=16, help="volumes per call (default: %(default)s)")
    parser.add_argument(
        "--train-labels", nargs="+", type=Path, default=[], metavar="CSV", help="of a file that has no labels: ids, and a "
        "column per class",
    )  # fmt: skip
    parser.add_argument("--test-labels", nargs="+", type=Path, default=[], metavar="CSV", help="the same of --test")
    parser.add_argument(
        "--label-mapping", default="", choices=list(MAPPINGS), help="for tables that are Rad-ChestCT's own"
    )
    parser.add_argument("--kind", choices=KINDS, help="do labels stand side by side or exclude one another?")
    parser.add_argument("--fractions", help="percent of the patients, e.g. 1,5,10,100")
    parser.add_argument("--seeds", help="draws of each part of the patients")
    parser.add_argument("--seed", help="of the validation part, and the first of the draws")
    return parser


def main(argv: list[str]) -> int:
    words, own = options_lib.split_overrides(argv, OVERRIDE)
    parser = _parser()
    args = parser.parse_args(own)
    overrides = {f"probe.{name}": getattr(args, name) for name in SHORT if getattr(args, name) is not None}
    overrides |= options_lib.override_values(words, OVERRIDE)
    if args.batch_size < 1:
        parser.error(f"--batch-size {args.batch_size}: must be at least 1")
    if args.workdir is None:
        evaluated, facts = _of_files(parser, args, overrides)
    else:
        evaluated, facts = _of_run(parser, args, overrides)
    probe = evaluated.evaluations["probe"]
    assert isinstance(probe, Probe)
    head = probe.head(evaluated.found["probe"], facts)
    written = evaluated.write(args.out)
    save_head(head, args.out / HEAD_FILE)
    print_tables(evaluated.document)
    print(f"written: {', '.join(map(str, [*written, args.out / HEAD_FILE]))}")
    return 0


Answer = tuple[Evaluated, dict[str, Any]]  # and the facts that go with the head


def _of_run(parser: argparse.ArgumentParser, args: argparse.Namespace, overrides: Mapping[str, str]) -> Answer:
    if args.train_labels or args.test_labels or args.label_mapping:
        parser.error("tables of labels are for files of embeddings; prepared folders have their labels")
    from mg3d_jax import config as config_lib
    from mg3d_jax.api import load  # imports JAX
    from mg3d_jax.evaluation.evaluate import evaluate

    run = load(args.workdir, args.step).restored
    evaluated = evaluate(
        run,
        args.test,
        only=["probe"],
        overrides=overrides,
        train_folders=args.train,
        batch_size=args.batch_size,
    )
    facts = {"run": str(run.folder), "step": run.step, "config_hash": config_lib.config_hash(run.config)}
    return evaluated, facts | {"train": args.train}


def _of_files(parser: argparse.ArgumentParser, args: argparse.Namespace, overrides: Mapping[str, str]) -> Answer:
    from mg3d_jax.evaluation import from_files

    if len(args.train) > 1 or len(args.test) > 1 or args.step is not None:
        parser.error("several folders, and --step, are of a run: give --workdir RUN, or one file of embeddings each")
    evaluations = configured(["probe"], overrides=overrides)
    mapping, of_train = mapping_of_each(args.label_mapping, args.test_labels, args.train_labels)
    train = from_files.read(Path(args.train[0]), labels=args.train_labels, label_mapping=of_train)
    found = from_files.read(Path(args.test[0]), labels=args.test_labels, label_mapping=mapping)
    about = train.facts.get("about") or {}
    known = {name: about[name] for name in ("run", "step", "config_hash") if name in about}
    return from_files.evaluate(found, evaluations, train=train, named=["probe"]), known | {"train": args.train}

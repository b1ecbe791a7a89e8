"""`mg3d evaluate`: zero-shot AUROC and retrieval of a trained run on prepared data."""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from mg3d_jax.data.pipeline import PreparedData
from mg3d_jax.data.tokens import ReportTokenizer
from mg3d_jax.evaluation import retrieval, zero_shot
from mg3d_jax.files import write_json
from mg3d_jax.progress import Progress


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="mg3d evaluate",
        description="Zero-shot AUROC of the labelled abnormalities and recall@k between volumes and reports. Writes "
        "evaluation.json and evaluation.png.",
    )
    parser.add_argument("--workdir", required=True, type=Path, help="a run of `mg3d train`")
    parser.add_argument("--data", required=True, nargs="+", help="prepared folder(s), not used in training")
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
    options = {"step": args.step, "batch_size": args.batch_size, "raw_weights": args.raw_weights}
    result = evaluate(args.workdir, tuple(args.data), **options)
    out = args.out or args.workdir / "evaluation"
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "evaluation.json", result, allow_nan=True)
    from mg3d_jax.evaluation.plots import plot_evaluation  # slow import

    plot_evaluation(result, out / "evaluation.png")
    print_tables(result)
    print(f"written: {out / 'evaluation.json'}, {out / 'evaluation.png'}")
    return 0


def evaluate(
    workdir: Path,
    data_folders: tuple[str, ...],
    *,
    step: int | None = None,
    batch_size: int = 16,
    raw_weights: bool = False,
) -> dict:
    """Embeds all volumes and distinct reports of the data and scores them. Every number's protocol is in the result.

    A run that keeps an average of its weights is scored by it, unless `raw_weights`.
    """
    from mg3d_jax.evaluation.embed import DataEmbedder, Embedder  # import JAX
    from mg3d_jax.training.restore import restore_run

    run = restore_run(workdir, step, ema=False if raw_weights else None)
    config = run.config
    data = PreparedData(data_folders, volume_size=tuple(config.model.volume_size))
    tokenizer = ReportTokenizer(run.tokenizer, config.data.max_tokens, config.data.max_sentences)
    with Progress("embed", len(data), unit="volumes") as progress:
        found = DataEmbedder(Embedder(run.setup, tokenizer, batch_size), data)(run.params, progress)
    scores = zero_shot.probabilities(found.volumes, found.prompts, found.logit_scale)
    return {
        "run": str(workdir),
        "step": int(run.meta["step"]),
        "weights": "average" if run.ema else "raw",
        "data": list(data_folders),
        "volumes": len(data),
        "patients": len(np.unique(found.patient_id)),
        "zero_shot": {"protocol": zero_shot.PROTOCOL}
        | zero_shot.evaluate(found.labels, scores, data.label_names, found.patient_id),
        "retrieval": {"protocol": retrieval.PROTOCOL}
        | retrieval.recall(found.volumes, found.report_id, found.reports, found.report_ids),
    }


def print_tables(result: dict) -> None:
    """The two tables of an evaluation on stdout."""
    console, zero = Console(), result["zero_shot"]
    table = Table(
        title=f"zero-shot AUROC, {result['volumes']} volumes of {result['patients']} patients", title_justify="left"
    )
    for heading in ("abnormality", "AUROC", "95 % interval"):
        table.add_column(heading)
    for key in [k for k in zero if k.startswith("auroc/") and not k.endswith("_95")] + ["auroc_macro"]:
        low, high = zero[f"{key}_95"]
        table.add_row(key.removeprefix("auroc/"), f"{zero[key]:.3f}", f"{low:.3f} to {high:.3f}")
    console.print(table)
    if zero["classes_without_both_outcomes"]:
        console.print("left out, all present or all absent:", ", ".join(zero["classes_without_both_outcomes"]))
    table = Table(title="retrieval", title_justify="left")
    for heading in ("direction", "recall", "value", "chance"):
        table.add_column(heading)
    for key, value in result["retrieval"].items():
        if "/recall@" in key:
            direction, _, k = key.partition("/recall@")
            table.add_row(
                direction.replace("_", " "),
                f"@{k}",
                f"{value:.3f}",
                f"{result['retrieval'][f'{direction}/chance@{k}']:.3f}",
            )
    console.print(table)

"""`mg3d embed`: volumes, reports and prompts to a file, for `mg3d evaluate --embeddings` and for code of one's own."""

from __future__ import annotations

import argparse
from pathlib import Path

from mg3d_jax.evaluation.document import OVERRIDE, configured
from mg3d_jax.evaluation.embedding_files import check_format
from mg3d_jax.options import override_values, split_overrides
from mg3d_jax.prepare.geometry import POLICIES


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="mg3d embed",
        description="Embeds prepared data, or single scans, to one file: volumes with their ids and labels, distinct reports, "
        "zero-shot prompts. All devices take part. After a kill the same command goes on, and the file is the same.",
        epilog=f"Wording of the prompts: {OVERRIDE}zero_shot.KEY=VALUE, as for `mg3d evaluate`.",
    )
    parser.add_argument("--workdir", required=True, type=Path, help="a run of `mg3d train`")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--data", nargs="+", help="prepared folder(s)")
    what.add_argument("--scan", nargs="+", type=Path, help="NIfTI files, or folders with one DICOM series each")
    parser.add_argument("--out", required=True, type=Path, help="FILE.npz or FILE.parquet")
    parser.add_argument("--sentences", action="store_true", help="embed every sentence of the reports, too")
    parser.add_argument("--step", type=int, help="which checkpoint (default: the newest)")
    parser.add_argument("--batch-size", type=int, default=16, help="volumes per call (default: %(default)s)")
    parser.add_argument(
        "--max-bad-records", type=int, default=0, help="skip and name so many damaged records (default: %(default)s)"
    )
    parser.add_argument(
        "--raw-weights",
        action="store_true",
        help="of a run with optimizer.ema: the weights themselves, not their average",
    )
    parser.add_argument(
        "--spacing", type=float, nargs=3, metavar=("X", "Y", "Z"), help="of --scan: mm that the run was trained with"
    )
    parser.add_argument("--policy", choices=sorted(POLICIES), help="of --scan: grid policy of `mg3d prepare`")
    return parser


def main(argv: list[str]) -> int:
    """Runs the command and prints what was written, and how fast."""
    words, own = split_overrides(argv, OVERRIDE)
    parser = _parser()
    args = parser.parse_args(own)
    if args.batch_size < 1:
        parser.error(f"--batch-size {args.batch_size}: must be at least 1")
    if args.scan and (args.sentences or args.max_bad_records):
        parser.error("--sentences and --max-bad-records are of --data")
    if args.data and (args.spacing or args.policy):
        parser.error("--spacing and --policy are of --scan")
    check_format(args.out)
    zero_shot = configured(["zero_shot"], overrides=override_values(words, OVERRIDE))["zero_shot"]
    import jax

    from mg3d_jax.evaluation.embed_files import embed_data, embed_scans
    from mg3d_jax.training.restore import restore_run

    run = restore_run(args.workdir, args.step, ema=False if args.raw_weights else None)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    if args.scan:
        spacing = tuple(args.spacing) if args.spacing else None
        done = embed_scans(run, args.scan, args.out, zero_shot, spacing=spacing, policy=args.policy)
    else:
        done = embed_data(
            run, args.data, args.out, zero_shot, sentences=args.sentences, batch_size=args.batch_size,
            max_bad_records=args.max_bad_records,
        )  # fmt: skip
    before = f", {done.resumed} were there already" if done.resumed else ""
    texts = f" and {done.texts} texts" if done.texts else ""
    print(
        f"{done.volumes} volumes{texts} in {done.seconds:.1f} s with compilation on {jax.device_count()} devices: "
        f"{done.volumes / max(done.seconds, 1e-9):.3g} volumes per second{before}"
    )
    print(f"written: {args.out}, {args.out.stat().st_size:,} bytes")
    return 0

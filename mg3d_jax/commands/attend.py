"""`mg3d attend`: where in a scan a sentence looks, as a NIfTI in the scan's own space and a PNG overlay."""

from __future__ import annotations

import argparse
from pathlib import Path

from mg3d_jax.prepare.geometry import POLICIES


def main(argv: list[str]) -> int:
    """Runs the command and prints where the map is strongest."""
    parser = argparse.ArgumentParser(
        prog="mg3d attend",
        description="Writes where in a scan a sentence looks: OUT/map.nii.gz in the scan's own space, OUT/overlay.png.",
    )
    parser.add_argument("--workdir", type=Path, required=True, help="the run")
    parser.add_argument(
        "--volume",
        type=Path,
        required=True,
        metavar="FILE",
        help="CT as .nii or .nii.gz, or a folder with a DICOM series",
    )
    parser.add_argument("--text", required=True, help='one sentence, e.g. "right pleural effusion"')
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to write")
    parser.add_argument(
        "--method", choices=("auto", "attention", "occlusion"), default="auto",
        help="auto: attention where the run has that head",
    )  # fmt: skip
    parser.add_argument("--step", type=int, help="which checkpoint (default: the newest)")
    parser.add_argument(
        "--spacing", type=float, nargs=3, metavar=("X", "Y", "Z"), help="mm per voxel that the run was trained with"
    )
    parser.add_argument(
        "--policy", choices=sorted(POLICIES),
        help="grid policy of `mg3d prepare` (default: that of the run's data where its folder is there, else center)",
    )  # fmt: skip
    args = parser.parse_args(argv)
    from mg3d_jax.api import load  # imports JAX
    from mg3d_jax.evaluation.attend import own_grid, write_overlay
    from mg3d_jax.prepare.scans import read_scan

    run = load(args.workdir, args.step, spacing=args.spacing, policy=args.policy)
    found = run.attend(args.volume, args.text, args.method)
    args.out.mkdir(parents=True, exist_ok=True)
    written = args.out / "map.nii.gz", args.out / "overlay.png"
    found.save(written[0])
    shown = read_scan(args.volume, own_grid(found.scan), whole=True)
    write_overlay(written[1], found, shown, args.volume.name)
    low, high = found.patches.min(), found.patches.max()
    print(f"{found.method} map of {args.text!r} at step {run.step}: {low:.4g} to {high:.4g}")
    print(f"similarity of the scan and the sentence: {found.similarity:.4f}")
    print(f"strongest around {found.peak} mm (RAS+)")
    print(f"written: {written[0]}, {written[1]}")
    return 0

"""`mg3d segment`: the classes of a scan's voxels by a run that was trained to segment, as NIfTI in the scan's own space."""

from __future__ import annotations

import argparse
from pathlib import Path

from mg3d_jax.errors import UserError


def main(argv: list[str]) -> int:
    """Runs the command and prints the volume of every class."""
    parser = argparse.ArgumentParser(
        prog="mg3d segment",
        description="Segments scans with a run that was trained with tasks.segmentation: OUT/NAME.nii.gz has the voxels and "
        "the affine of the scan NAME, and a class for each.",
    )
    parser.add_argument("--workdir", type=Path, required=True, help="the run")
    parser.add_argument(
        "--volume", type=Path, nargs="+", required=True, metavar="FILE",
        help="scans as .nii or .nii.gz, or folders with a DICOM series",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to write")
    parser.add_argument("--step", type=int, help="which checkpoint (default: the newest)")
    parser.add_argument("--overlap", type=float, default=0.5, help="of windows, a share of their size (default: 0.5)")
    parser.add_argument(
        "--windows", type=int, default=4, metavar="N", help="windows per call of the network (default: 4)"
    )
    parser.add_argument(
        "--spacing", type=float, nargs=3, metavar=("X", "Y", "Z"), help="mm per voxel that the run was trained with"
    )
    parser.add_argument("--modality", choices=("CT", "MR"), default="CT", help="of the scans (default: CT)")
    args = parser.parse_args(argv)
    from mg3d_jax.api import load  # imports JAX
    from mg3d_jax.evaluation.label_tables import bare
    from mg3d_jax.progress import Progress

    names = [bare(volume.name) for volume in args.volume]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise UserError(f"--volume: {', '.join(twice)} would be written twice: segment them into separate folders")
    run = load(args.workdir, args.step, spacing=args.spacing)
    args.out.mkdir(parents=True, exist_ok=True)
    with Progress("segment", len(names), unit="scans") as progress:
        for name, volume in zip(names, args.volume, strict=True):
            found = run.segment(volume, overlap=args.overlap, windows=args.windows, modality=args.modality)
            found.save(args.out / f"{name}.nii.gz")
            print(f"{name}: " + ", ".join(f"{one} {ml:.1f} ml" for one, ml in found.millilitres.items()))
            progress.advance()
    print(f"written: {len(names)} files in {args.out}")
    return 0

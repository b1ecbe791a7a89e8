"""`mg3d export`: write a run's weights for PyTorch and Hugging Face users, or its ViT for MONAI users."""

from __future__ import annotations

import argparse
from pathlib import Path

from mg3d_jax.interop.export import FORMATS, check_out, export, torch_module
from mg3d_jax.interop.export_run import load_run


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="mg3d export",
        description="Writes a run's weights for users of PyTorch. `hf`: both towers as a folder for "
        "AutoModel.from_pretrained(OUT, trust_remote_code=True), with tokenizer, preprocessing and a readable PyTorch "
        "module. `monai`: the volume encoder as a state dict that monai.networks.nets.ViT loads strictly. The PyTorch "
        "model is run on phantom CT beside the JAX one; a difference above 1e-4 is an error and leaves OUT as it was.",
    )
    parser.add_argument("--workdir", required=True, type=Path, help="the run: the --workdir of `mg3d train`")
    parser.add_argument("--out", required=True, type=Path, help="folder to write: new, empty, or an earlier export")
    parser.add_argument("--step", type=int, help="which checkpoint (default: the newest)")
    parser.add_argument("--format", choices=sorted(FORMATS), default="hf", help="default: %(default)s")
    parser.add_argument(
        "--spacing", nargs=3, type=float, metavar=("X", "Y", "Z"),
        help="mm per voxel of the training volumes; needed only where neither checkpoint nor data says it",
    )  # fmt: skip
    return parser


def main(argv: list[str]) -> int:
    """The command. Prints what was written and how well the two frameworks agree."""
    args = _parser().parse_args(argv)
    torch_module()
    check_out(args.out)
    run = load_run(args.workdir, args.step, tuple(args.spacing) if args.spacing else None)
    lines = export(run, args.out, args.format)
    print("\n".join([f"{args.out}: step {run.step} of {args.workdir}", *lines]))
    for file in sorted(args.out.iterdir()):
        print(f"  {file.name}  {file.stat().st_size:,} bytes")
    return 0

"""`mg3d import`: published weights (MONAI SwinUNETR, MONAI ViT, BERT) -> a folder that a run can start from."""

from __future__ import annotations

import argparse
from pathlib import Path

from mg3d_jax.interop.tower import Tower, save_tower

MAX_LISTED = 20


def parser() -> argparse.ArgumentParser:
    """Options of `mg3d import`."""
    root = argparse.ArgumentParser(
        prog="mg3d import",
        description="Converts published weights, strictly: every key of the file must have a place in the model or be "
        "on the printed list of parts that an encoder does not need. Start a run from the result with "
        "--config.model.volume_encoder.pretrained=DIR or --config.model.report_encoder.pretrained=DIR.",
    )
    kinds = root.add_subparsers(dest="kind", required=True, metavar="{monai-swin,monai-vit,bert}")
    swin = kinds.add_parser("monai-swin", help="the encoder of MONAI's SwinUNETR (MG-3D, VoCo, MONAI releases)")
    swin.add_argument(
        "--merging",
        choices=("merging", "mergingv2"),
        default="merging",
        help="MONAI's downsample option that the weights were trained with (default: merging, as SwinUNETR's)",
    )
    vit = kinds.add_parser("monai-vit", help="MONAI's ViT, or the one inside UNETR")
    vit.add_argument("--volume-size", type=int, nargs=3, required=True, metavar=("X", "Y", "Z"), help="its img_size")
    vit.add_argument("--heads", type=int, required=True, help="its num_heads")
    vit.add_argument(
        "--patch-size",
        type=int,
        nargs=3,
        metavar=("X", "Y", "Z"),
        help="its patch_size; needed for proj_type='perceptron' only",
    )
    bert = kinds.add_parser("bert", help="a BERT or RoBERTa encoder: a folder, or a Hugging Face name")
    for kind, meaning in ((swin, ".pt, .pth or .safetensors file"), (vit, ".pt, .pth or .safetensors file")):
        kind.add_argument("file", type=Path, metavar="FILE", help=meaning)
    bert.add_argument(
        "file", metavar="FOLDER|NAME", help="folder with config.json and weights, or owner/name on the hub"
    )
    for kind in (swin, vit, bert):
        kind.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to write")
    return root


def read(args: argparse.Namespace) -> Tower:
    """The tower that the arguments name."""
    if args.kind == "monai-swin":
        from mg3d_jax.interop.monai_swin import load_monai_swin

        encoder, params, unused = load_monai_swin(args.file, args.merging)
        return Tower("swin", encoder, params, args.file.name, unused)
    if args.kind == "monai-vit":
        from mg3d_jax.interop.monai_vit import load_monai_vit

        patch = None if args.patch_size is None else tuple(args.patch_size)
        encoder, params, unused = load_monai_vit(args.file, tuple(args.volume_size), args.heads, patch)
        return Tower("vit", encoder, params, args.file.name, unused)
    from mg3d_jax.interop.bert import load_bert

    loaded = load_bert(args.file)
    return Tower("bert", loaded.config.encoder_fields(), loaded.params, Path(args.file).name, loaded.unused)


def main(argv: list[str]) -> int:
    """Runs the command; prints what was read and which keys of the file were left out."""
    args = parser().parse_args(argv)
    tower = read(args)
    save_tower(tower, args.out)
    if args.kind == "bert":
        from mg3d_jax.interop.bert import copy_tokenizer

        own = copy_tokenizer(args.file, args.out)
        use = f"use it: --config.data.tokenizer={args.out}" if own else "none in its folder; use the checkpoint's own"
        print(f"tokenizer: {use}")
    print(f"{args.kind} from {args.file}: {tower.parameter_count:,} parameters")
    for name, value in tower.encoder.items():
        print(f"  {name:<22} {value}")
    if tower.unused:
        print(f"left out, no part of the encoder: {len(tower.unused)} keys")
        for key in sorted(tower.unused)[:MAX_LISTED]:
            print(f"  {key}")
        if len(tower.unused) > MAX_LISTED:
            print(f"  ... and {len(tower.unused) - MAX_LISTED} more")
    print(f"written to {args.out}")
    return 0

"""`mg3d import`: published weights (MONAI SwinUNETR, MONAI ViT, BERT) -> a folder that a run can start from."""

from __future__ import annotations

import argparse
from pathlib import Path

from mg3d_jax.interop.hugging_face import copy_tokenizer, load_checkpoint
from mg3d_jax.interop.state_dict import read_state_dict
from mg3d_jax.interop.tower import Tower, save_tower
from mg3d_jax.models.towers.base import Form
from mg3d_jax.registry import REPORT_TOWERS, VOLUME_TOWERS

MAX_LISTED = 20


def forms() -> dict[str, tuple[str, Form]]:
    """`{name of the form: (kind of the tower, form)}` of all registered towers."""
    return {
        name: (kind, form)
        for towers in (VOLUME_TOWERS, REPORT_TOWERS)
        for kind, tower in towers.items()
        for name, form in tower.forms.items()
    }


def parser() -> argparse.ArgumentParser:
    """Options of `mg3d import`."""
    root = argparse.ArgumentParser(
        prog="mg3d import",
        description="Converts published weights, strictly: every key of the file must have a place in the model or be "
        "on the printed list of parts that an encoder does not need. Start a run from the result with "
        "--config.model.volume_encoder.pretrained=DIR or --config.model.report_encoder.pretrained=DIR.",
    )
    kinds = root.add_subparsers(dest="form", required=True, metavar=f"{{{','.join(forms())}}}")
    for name, (_, form) in forms().items():
        sub = kinds.add_parser(name, help=form.help)
        for option, settings in form.arguments.items():
            sub.add_argument(option, **settings)
        if form.folder:
            meaning = "folder with config.json and weights, or owner/name on the hub"
            sub.add_argument("source", metavar="FOLDER|NAME", help=meaning)
        else:
            sub.add_argument("source", metavar="FILE", help=".pt, .pth or .safetensors file")
        sub.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to write")
    return root


def read(args: argparse.Namespace) -> Tower:
    """The tower that the arguments name."""
    kind, form = forms()[args.form]
    given = {name: value for name, value in vars(args).items() if name not in ("form", "source", "out")}
    if form.folder:
        imported = load_checkpoint(args.source, form)
    else:
        imported = form.convert(read_state_dict(Path(args.source)), args.source, **given)
    return Tower(kind, imported.fields, imported.params, Path(args.source).name, imported.unused)


def main(argv: list[str]) -> int:
    """Runs the command; prints what was read and which keys of the file were left out."""
    args = parser().parse_args(argv)
    tower = read(args)
    save_tower(tower, args.out)
    if forms()[args.form][1].folder:
        own = copy_tokenizer(args.source, args.out)
        use = f"use it: --config.data.tokenizer={args.out}" if own else "none in its folder; use the checkpoint's own"
        print(f"tokenizer: {use}")
    print(f"{args.form} from {args.source}: {tower.parameter_count:,} parameters")
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

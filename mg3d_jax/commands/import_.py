"""`mg3d import`: published weights (MONAI SwinUNETR, MONAI ViT, BERT), or a model that `mg3d export` wrote and PyTorch users
have tuned -> a folder that a run can start from."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from mg3d_jax import config as config_lib
from mg3d_jax.evaluation.probes import HEAD_FILE, ProbeHead, save_head
from mg3d_jax.interop.finetune import keys_of
from mg3d_jax.interop.hugging_face import copy_tokenizer, load_checkpoint
from mg3d_jax.interop.state_dict import read_weights
from mg3d_jax.interop.tower import Tower, save_tower
from mg3d_jax.models.towers.base import Form
from mg3d_jax.registry import REPORT_TOWERS, VOLUME_TOWERS

MAX_LISTED = 20
MODEL = "hf"


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
        "on the printed list of parts that an encoder does not need. Wrappers around the model in a checkpoint (module., "
        "teacher.backbone., state_dict, ...) are recognised; where several models are in it, they are listed. Start a run "
        "from the result with --config.model.volume_encoder.pretrained=DIR or --config.model.report_encoder.pretrained=DIR.",
    )
    kinds = root.add_subparsers(dest="form", required=True, metavar=f"{{{','.join((MODEL, *forms()))}}}")
    whole = kinds.add_parser(
        MODEL,
        help="a whole model, as `mg3d export --format hf` or its save_pretrained wrote it: towers, projections, heads",
    )
    whole.add_argument("source", metavar="FOLDER", type=Path)
    whole.add_argument(
        "--weights",
        type=Path,
        metavar="FILE",
        help="a checkpoint of that model, or of what it was wrapped in (Lightning, DDP, ...), in place of the folder's weights",
    )
    _add_prefix(whole)
    whole.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to write, for init_from.path")
    for name, (_, form) in forms().items():
        sub = kinds.add_parser(name, help=form.help)
        for option, settings in form.arguments.items():
            sub.add_argument(option, **settings)
        if form.folder:
            meaning = "folder with config.json and weights, or owner/name on the hub"
            sub.add_argument("source", metavar="FOLDER|NAME", help=meaning)
        else:
            sub.add_argument("source", metavar="FILE", help=".pt, .pth or .safetensors file")
            _add_prefix(sub)
        sub.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to write")
    return root


def _add_prefix(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--prefix",
        metavar="TEXT",
        help='only the keys that begin with it, e.g. "student.backbone." (default: found, where exactly one place fits)',
    )


def read(args: argparse.Namespace) -> Tower:
    """The tower that the arguments name."""
    kind, form = forms()[args.form]
    given = {name: value for name, value in vars(args).items() if name not in ("form", "source", "out", "prefix")}
    if form.folder:
        imported = load_checkpoint(args.source, form)
    else:
        weights, left_out = read_weights(Path(args.source), form.root, args.prefix)
        imported = form.convert(weights, args.source, **given)
        imported = replace(imported, unused=[*imported.unused, *left_out])
    return Tower(kind, imported.fields, imported.params, Path(args.source).name, imported.unused)


def main(argv: list[str]) -> int:
    """Runs the command; prints what was read and which keys of the file were left out."""
    args = parser().parse_args(argv)
    if args.form == MODEL:
        return _whole(args)
    tower = read(args)
    save_tower(tower, args.out)
    if forms()[args.form][1].folder:
        own = copy_tokenizer(args.source, args.out)
        use = f"use it: --config.data.tokenizer={args.out}" if own else "none in its folder; use the checkpoint's own"
        print(f"tokenizer: {use}")
    print(f"{args.form} from {args.source}: {tower.parameter_count:,} parameters")
    for name, value in tower.encoder.items():
        print(f"  {name:<22} {value}")
    _print_unused(tower.unused, "no part of the encoder")
    print(f"written to {args.out}; a run starts from it with")
    for key, value in keys_of(tower, args.out).items():
        print(f"  --config.{key}={_word(value)}")
    return 0


def _whole(args: argparse.Namespace) -> int:
    from mg3d_jax.interop.import_model import read_model, save_model

    source, out = args.source, args.out
    model = read_model(source, args.weights, args.prefix)
    save_model(model, source, out)
    print(f"{args.weights or source}: {sum(model.sizes().values()):,} parameters")
    for name, size in model.sizes().items():
        print(f"  {name:<24} {size:,}")
    if probe := model.probe:
        head = ProbeHead(probe.weight, probe.bias, probe.classes, probe.kind, {"imported_from": str(source)})
        save_head(head, out / HEAD_FILE)
        print(
            f"{HEAD_FILE}: a head for {len(head.classes)} classes; `mg3d export --probe` adds it to these weights again"
        )
    _print_unused(model.unused, "no part of the model")
    print(f"written to {out}; a run starts from it with (default in brackets)")
    defaults = config_lib.default()
    for key, value in (model.keys | {"init_from.path": str(out), "data.tokenizer": str(out)}).items():
        print(f"  --config.{key}={_word(value)}   ({_word(_at(defaults, key))})")
    return 0


def _print_unused(keys: Sequence[str], why: str) -> None:
    if not keys:
        return
    print(f"left out, {why}: {len(keys)} keys")
    for key in sorted(keys)[:MAX_LISTED]:
        print(f"  {key}")
    if len(keys) > MAX_LISTED:
        print(f"  ... and {len(keys) - MAX_LISTED} more")


def _at(config: Any, key: str) -> Any:
    for part in key.split("."):
        config = config[part]
    return config


def _word(value: Any) -> str:
    """As the command line takes it."""
    return f"'{json.dumps(value)}'".replace('"', "") if isinstance(value, list | tuple) else str(value)

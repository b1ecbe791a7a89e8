"""`mg3d export`: write a run's weights for PyTorch and Hugging Face users, or its ViT or segmentation for MONAI users."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

from mg3d_jax import config as config_lib
from mg3d_jax.data.abnormalities import ABNORMALITIES
from mg3d_jax.errors import UserError
from mg3d_jax.evaluation.probes import load_head
from mg3d_jax.evaluation.zero_shot import ZeroShot
from mg3d_jax.files import read_json
from mg3d_jax.interop.export import FORMATS, check_out, export, refuse
from mg3d_jax.interop.export_check import torch_module
from mg3d_jax.interop.export_format import Probe
from mg3d_jax.interop.export_options import DTYPES, SHARD_SIZE, Extras, shard_bytes
from mg3d_jax.interop.export_run import Run, load_run
from mg3d_jax.prepare.geometry import POLICIES
from mg3d_jax.training.run_folder import CONFIG_FILE, SUMMARY_FILE


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="mg3d export",
        description="Writes a run's weights for users of PyTorch. `hf`: both towers as a folder for "
        "AutoModel.from_pretrained(OUT, trust_remote_code=True), with tokenizer, preprocessing and a readable PyTorch "
        "module; of a fine-tuned run with its head, its segmentation decoder and sliding window, or its report decoder. "
        "`monai`: the volume encoder as a state dict that MONAI's ViT, or the swinViT of its SwinUNETR, loads strictly; a run "
        "that segments as one of UNETR or SwinUNETR. `bert`: the report encoder as a BertModel. `onnx`, `pt2`: both encoders "
        "and the heads of tasks as ONNX files or programs of torch.export. What "
        "is exported is run on phantom CT beside the JAX model; a difference "
        "above 1e-4 (of the shares of voxel classes 1e-3) is an error and leaves OUT as it was.",
    )
    parser.add_argument("--workdir", required=True, type=Path, help="the run: the --workdir of `mg3d train`")
    parser.add_argument("--out", required=True, type=Path, help="folder to write: new, empty, or an earlier export")
    parser.add_argument("--step", type=int, help="which checkpoint (default: the newest)")
    parser.add_argument("--format", choices=sorted(FORMATS), default="hf", help="default: %(default)s")
    parser.add_argument(
        "--probe",
        type=Path,
        metavar="FILE",
        help="a probe.safetensors of `mg3d probe` on this run: adds `probe_logits` to hf",
    )
    parser.add_argument(
        "--prompts",
        help="how `model.zero_shot` of hf asks: a set of prompts by name, or a file, as in mg3d evaluate (default: what the "
        "run's configuration says)",
    )
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of hf's weights (default: %(default)s)")
    parser.add_argument(
        "--shard-size", default=SHARD_SIZE, metavar="SIZE", help="of hf's files at most (default: %(default)s)"
    )
    parser.add_argument(
        "--spacing", nargs=3, type=float, metavar=("X", "Y", "Z"),
        help="mm per voxel of the training volumes; needed only where neither checkpoint nor data says it",
    )  # fmt: skip
    parser.add_argument(
        "--policy", choices=sorted(POLICIES), help="how the training volumes were placed on the grid; needed only where the "
        "folders of the data differ",
    )  # fmt: skip
    return parser


def _probe(path: Path, run: Run) -> Probe:
    """`UserError` where the head was fitted to other weights, as far as it says so."""
    head = load_head(path)
    ours = {"step": run.step, "config_hash": config_lib.config_hash(run.config)}
    if wrong := [name for name, value in ours.items() if head.facts.get(name, value) != value]:
        found = ", ".join(f"{name} {head.facts[name]}, not {ours[name]}" for name in wrong)
        raise UserError(f"{path}: fitted to the embeddings of another model ({found}): fit a probe to this one")
    return Probe(head.weight, head.bias, head.classes, head.kind)


def _zero_shot(run: Run, prompts: str | None) -> dict[str, Any]:
    """`zero_shot.json`: what the run's evaluation asks, for the labels of its data, or CT-RATE's where it has none."""
    options = run.config.evaluations["zero_shot"]
    evaluation = ZeroShot(options if prompts is None else replace(options, prompts=prompts))
    return evaluation.exported(run.label_names or ABNORMALITIES)


def _json(path: Path) -> dict[str, Any] | None:
    return read_json(path) if path.is_file() else None


def _evaluated(run: Run, workdir: Path) -> dict[str, Any] | None:
    """What `mg3d evaluate` wrote of the exported step beside the run, if it did."""
    found = _json(workdir / "evaluation" / "evaluation.json")
    return found if found and found.get("step") == run.step else None


def main(argv: list[str]) -> int:
    """The command. Prints what was written and how well the two frameworks agree."""
    args = _parser().parse_args(argv)
    torch_module()
    check_out(args.out)
    shard_bytes(args.shard_size)
    if (args.workdir / CONFIG_FILE).is_file():  # else `load_run` says what the folder lacks
        refuse(config_lib.read(args.workdir / CONFIG_FILE), args.format)
    run = load_run(args.workdir, args.step, tuple(args.spacing) if args.spacing else None, args.policy)
    extras = Extras(
        probe=_probe(args.probe, run) if args.probe else None,
        zero_shot=_zero_shot(run, args.prompts),
        evaluated=_evaluated(run, args.workdir),
        trained=_json(args.workdir / SUMMARY_FILE),
        dtype=args.dtype,
        shard_size=args.shard_size,
    )
    lines = export(run, args.out, args.format, extras)
    print("\n".join([f"{args.out}: step {run.step} of {args.workdir}", *lines]))
    for file in sorted(args.out.iterdir()):
        print(f"  {file.name}  {file.stat().st_size:,} bytes")
    return 0

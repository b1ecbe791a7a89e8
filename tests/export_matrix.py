"""Exports of every family of presets beside the JAX model, with several versions of transformers; prints a table.

    bash launch/old_transformers.sh OLD
    python tests/export_matrix.py --transformers OLD

Every version runs in a process of its own in which neither jax nor this package can be imported. `float32`: the largest
difference of the numbers of volume and of text embeddings from the JAX model's; `bf16`: one minus the smallest cosine between
the embeddings that the bfloat16 folder gives, computing in bfloat16, and the JAX model's, of the unrounded weights. Of a model
in MONAI the normalised tokens are compared instead, and its float32 folder computes in bfloat16.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from exported_runs import random_run
from support import environment

from mg3d_jax.config.text_package import has_package, package_folder
from mg3d_jax.data.tokens import load_tokenizer, save_tokenizer, train_wordpiece
from mg3d_jax.interop.export import export
from mg3d_jax.interop.export_options import Extras
from mg3d_jax.interop.export_run import reference_features
from mg3d_jax.interop.hugging_face import load_checkpoint
from mg3d_jax.models.towers import bert

ENCODER, REPORT = "model__volume_encoder__", "model__report_encoder__"
VIT = {"model__volume_size": (32, 32, 32), ENCODER + "patch_size": (16, 16, 16)}
SWIN = {
    "model__volume_size": (32, 32, 64),
    ENCODER + "kind": "swin",
    ENCODER + "patch_size": (16, 16, 16),
    REPORT + "preset": "mini",
}
WINDOWS = ((-1000.0, 1000.0), (-150.0, 250.0), (-1000.0, -200.0))
TI = VIT | {ENCODER + "preset": "ti", REPORT + "preset": "mini"}
FAMILIES: dict[str, dict[str, Any]] = {
    "ViT-ti, sine positions": TI,
    "ViT-s, learned positions": TI | {ENCODER + "preset": "s", ENCODER + "positions": "learned"},
    "ViT-ti, registers, qk norm": TI | {ENCODER + "num_registers": 4, ENCODER + "qk_norm": True},
    "ViT-ti, layer scale, mean": TI | {ENCODER + "layer_scale": 0.1, ENCODER + "pooling": "mean"},
    "ViT-ti, conv stem, three windows": TI | {ENCODER + "stem": "conv", "data__windows": WINDOWS},
    "ViT-ti, exact GELU, sigmoid loss": TI | {ENCODER + "exact_gelu": True, "objectives__alignment__form": "sigmoid"},
    "ViT-ti, RoBERTa": TI | {REPORT + "preset": "roberta-base"},
    "ViT-ti, groups of sentences": TI | {"objectives__alignment__report_view": "subsets"},
    "ViT-ti, MiniLM's real weights": TI | {"objectives__alignment__report_view": "report"},
    "ViT-ti, layer scale, three windows, in MONAI": TI | {ENCODER + "layer_scale": 0.1, "data__windows": WINDOWS},
    "Swin-b, in MONAI": SWIN | {ENCODER + "preset": "swin-b"},
    "Swin-b v2, three windows, in MONAI": SWIN | {ENCODER + "preset": "swin-b-v2", "data__windows": WINDOWS},
}
TEXTS = [["No pleural effusion."], ["The heart is normal in size."], ["A nodule of 8 mm is seen."]]
RECEIVE = """
import json, sys
for name in ("jax", "jaxlib", "flax", "orbax", "mg3d_jax"):
    sys.modules[name] = None  # importing it raises ImportError
import numpy as np, torch, transformers
from transformers import AutoModel
found_of = {"version": transformers.__version__}
for number, folders in enumerate(json.loads(sys.argv[1])):
    given = np.load(folders["given"])
    hu = torch.from_numpy(given["volumes"])
    if "monai" in folders:
        from monai.networks import nets
        from safetensors.torch import load_file
        about = json.load(open(folders["monai"] + "/config.json"))
        network = getattr(nets, about["monai_class"].rpartition(".")[2])(**about["arguments"]).eval()
        part = network.get_submodule(about.get("part", ""))
        part.load_state_dict(load_file(folders["monai"] + "/model.safetensors"), strict=True)
        for block in getattr(part, "blocks", ()):
            block.mlp.fn = torch.nn.GELU(approximate="tanh")
        windowed = torch.stack([((hu.float() - a) / (b - a)).clamp(0, 1) for a, b in given["windows"]], 1)
        expected = torch.from_numpy(given["tokens"])
        for name, kind in (("float32", torch.float32), ("bf16", torch.bfloat16)):
            with torch.no_grad():
                found = part.to(kind)(windowed.to(kind))
            tokens = (found[-1].flatten(2).transpose(1, 2) if "part" in about else found[0]).float()
            near = torch.nn.functional.cosine_similarity(tokens.flatten(1), expected.flatten(1))
            found_of[f"{number} {name}"] = [float((tokens - expected).abs().max() if name == "float32" else 1 - near.min())]
        continue
    for name in ("float32", "bf16"):
        kind = torch.float32 if name == "float32" else torch.bfloat16
        model = AutoModel.from_pretrained(folders[name], trust_remote_code=True, torch_dtype=kind).eval()
        assert model.dtype == kind, model.dtype
        with torch.no_grad():
            volume = model.get_image_features(hu).float().numpy()
            text = model.encode_texts(json.loads(str(given["texts"]))).float().numpy()
        pairs = ((volume, given["volume"]), (text, given["text"]))
        if name == "float32":
            values = [np.abs(found - expected).max() for found, expected in pairs]
        else:
            values = [1 - (found * expected).sum(-1).min() for found, expected in pairs]
        found_of[f"{number} {name}"] = list(map(float, values))
print("RESULT" + json.dumps(found_of))
"""


def made(name: str, overrides: dict[str, Any], tokenizer: Path, base: Path) -> dict[str, str] | None:
    """The folders of one family, and what the JAX model makes of phantoms; None where real weights are missing."""
    if "MiniLM" in name:
        if not has_package():
            return None
        save_tokenizer(load_tokenizer(package_folder()), base / "tokenizer")
        bert.PRESETS["minilm"], tokenizer = bert.BertSizes(384, 6, 12, 1536), base / "tokenizer"
        overrides = overrides | {REPORT + "preset": "minilm"}
    run = random_run(tokenizer, **overrides)
    if "MiniLM" in name:
        imported = load_checkpoint(package_folder(), bert.BERT.forms["bert"])
        run = replace(run, params=run.params | {"report_encoder": imported.params})
    kinds = {"monai": "monai"} if name.endswith("in MONAI") else {"float32": "hf", "bf16": "hf"}
    folders = {kind: str(base / kind) for kind in kinds}
    for kind, form in kinds.items():
        export(run, Path(folders[kind]), form, Extras(dtype="bf16" if kind == "bf16" else "float32"))
    shape = (3, *run.config.model.volume_size)
    volumes = np.random.default_rng(0).integers(-1024, 1500, shape).astype(np.int16)
    expected = reference_features(run, volumes, TEXTS)
    np.savez(
        base / "given.npz", volumes=volumes, texts=json.dumps(TEXTS), volume=expected["volume_embedding"],
        text=expected["report_embedding"], tokens=expected["volume_tokens"], windows=run.config.data.windows,
    )  # fmt: skip
    return folders | {"given": str(base / "given.npz")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--transformers", nargs="*", type=Path, default=[], help="folders with other versions of it")
    parser.add_argument("--only", default="", help="families whose name has this in it")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        base, names, folders = Path(place), [], []
        words = {sentence for text in TEXTS for sentence in text} | {"Emphysema is present.", "There is no cyst."}
        save_tokenizer(train_wordpiece(words, 200), base / "tokenizer")
        for number, (name, overrides) in enumerate(FAMILIES.items()):
            if args.only in name and (found := made(name, overrides, base / "tokenizer", base / str(number))):
                names.append(name)
                folders.append(found)
        columns = []
        for at in [None, *args.transformers]:
            environ = environment(HF_MODULES_CACHE=str(base / f"modules{len(columns)}"), PYTHONPATH=str(at or ""))
            command = [sys.executable, "-c", RECEIVE, json.dumps(folders)]
            done = subprocess.run(command, env=environ, capture_output=True, text=True, check=False)
            if done.returncode:
                raise SystemExit(done.stderr)
            columns.append(json.loads(done.stdout.rpartition("RESULT")[2]))
    heads = [f"{column['version']} {kind}" for column in columns for kind in ("float32", "bf16")]
    print(f"| family | {' | '.join(heads)} |\n|---|{'---|' * len(heads)}")
    for number, name in enumerate(names):
        values = [
            ", ".join(f"{value:.1e}" for value in column[f"{number} {kind}"])
            for column in columns
            for kind in ("float32", "bf16")
        ]
        print(f"| {name} | {' | '.join(values)} |")


if __name__ == "__main__":
    main()

"""A run's weights for PyTorch and Hugging Face users, or its ViT for MONAI users.

The export is checked before anything reaches its place: phantom CT and reports go through the Linen model and through the
PyTorch one, both in float32, and the embeddings must agree.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np

from mg3d_jax import config as config_lib
from mg3d_jax.config import Config
from mg3d_jax.errors import UserError
from mg3d_jax.files import read_json, write_json
from mg3d_jax.interop import (
    export_bert,
    export_card,
    export_check,
    export_format,
    export_front_matter,
    export_graphs,
    export_monai,
    export_preparation,
    export_weights,
)
from mg3d_jax.interop.export_check import SHARES, check_close, softmax
from mg3d_jax.interop.export_options import Extras
from mg3d_jax.interop.export_run import Run, phantom_inputs, reference_features
from mg3d_jax.models.towers.base import MonaiNetwork

FILES = "files.txt"  # what an export wrote, by which a later one into the same folder takes its place


def write_hugging_face(run: Run, folder: Path, extras: Extras) -> list[str]:
    """Writes what `AutoModel.from_pretrained(folder, trust_remote_code=True)` loads. Returns lines to print."""
    from mg3d_jax.interop.torch_template.text_mg3d import vocabulary_hash

    run, probe = replace(run, params=export_weights.rounded(run.params, extras.dtype)), extras.probe
    params, left_out = export_format.split_params(run.params)
    arguments = export_format.torch_config(run.config, params, run.spacing, run.grid.policy)
    special = run.tokenizer.special
    arguments["vocabulary_hash"] = vocabulary_hash(run.tokenizer.tokenizer.get_vocab())
    arguments["special_token_ids"] = sorted({special[name] for name in ("[CLS]", "[SEP]", "[PAD]")})
    arguments |= export_format.head_arguments(run.config, params, run.label_names)
    tasks = export_format.task_arguments(run.config, params, run.mask_names)
    arguments |= tasks | (probe.arguments() if probe else {})
    content = export_format.hugging_face_config(
        arguments, step=run.step, config_hash=config_lib.config_hash(run.config), tasks=bool(tasks), dtype=extras.dtype
    )
    write_json(folder / "config.json", content)
    write_json(folder / "preprocessor_config.json", export_preparation.preprocessor_config(run))
    write_json(folder / "processor_config.json", export_preparation.processor_config(run))
    state = export_format.torch_state(params, run.config) | (probe.state() if probe else {})
    export_weights.save(state, folder, dtype=extras.dtype, shard_size=extras.shard_size, settings=json.dumps(arguments))
    more = ("modeling_mg3d_tasks",) if tasks else ()
    export_preparation.write(folder, (*export_preparation.MODULES, *more))
    for file in sorted(run.tokenizer_folder.iterdir()):
        shutil.copyfile(file, folder / file.name)
    told = read_json(folder / "tokenizer_config.json")
    write_json(folder / "tokenizer_config.json", export_preparation.tokenizer_config(run, told))
    if extras.zero_shot:
        write_json(folder / "zero_shot.json", extras.zero_shot)
    inputs = phantom_inputs(run.model_grid)
    export_check.check_processor(run, folder, inputs)
    stored = export_weights.as_stored(run, state, extras.dtype)
    differences, verification = export_check.compare(stored, folder, inputs, probe)
    export_check.write_example(folder)
    (folder / "README.md").write_text(export_card.model_card(run, differences, left_out, arguments, extras))
    export_front_matter.write_licence(run, folder)
    export_check.write_verification(folder, verification)
    lines = [f"{name}: JAX and PyTorch differ by at most {value:.1e}" for name, value in differences.items()]
    if left_out:
        lines.append(f"not exported, needed in pre-training only: {', '.join(left_out)}")
    return lines


def write_monai(run: Run, folder: Path, extras: Extras) -> list[str]:
    """Writes the volume encoder as a state dict of MONAI's `ViT` or of `SwinUNETR.swinViT`, or a model that segments as one of
    its `UNETR` or `SwinUNETR`; the ViT alone where UNETR has no place for its decoder. Returns lines to print."""
    inputs = phantom_inputs(run.model_grid)
    expected = reference_features(run, inputs.volumes, inputs.reports)
    network, lines = _monai_network(run)
    found = export_monai.write(run, folder, network, inputs.volumes)
    if network.name == "ViT" or network.part:
        name, expected, classes = "volume_tokens", {"volume_tokens": expected["volume_tokens"]}, []
    else:
        name, classes = SHARES, export_format.mask_classes(run.config, run.mask_names)
        expected, found = {name: softmax(expected["segmentation_logits"])}, softmax(np.moveaxis(found, 1, -1))
        about = read_json(folder / "config.json") | {"classes": classes}
        write_json(folder / "config.json", about)
    difference = check_close(expected, {name: found})[name]
    write_json(folder / "preprocessor_config.json", export_preparation.preprocessor_config(run, processor=False))
    tanh = export_monai.needs_tanh_gelu(run)
    (folder / "README.md").write_text(export_card.monai_card(run, network, classes, difference, tanh))
    export_front_matter.write_licence(run, folder, ("torch>=2.6", "monai>=1.5,<2", "safetensors>=0.5,<1"))
    called = f"{network.name}.{network.part}" if network.part else network.name
    lines.append(f"{called}: {name}: JAX and MONAI differ by at most {difference:.1e}")
    if tanh:
        lines.append("set MONAI's GELU to the tanh form, which the model was trained with: README.md has the two lines")
    return lines


def _monai_network(run: Run) -> tuple[MonaiNetwork, list[str]]:
    """What of MONAI's a run is, and lines on what of it that leaves out."""
    model, tower = run.config.model, run.config.model.volume_encoder.tower
    channels = len(run.config.data.windows)
    assert tower.to_monai_encoder is not None, "refused before"
    if export_format.SEGMENTATION_HEAD not in run.params or tower.to_monai_network is None:
        return tower.to_monai_encoder(run.params["volume_encoder"], model, channels), []
    try:
        return tower.to_monai_network(run.params, model, channels), []
    except UserError as error:
        if tower.to_torch is None:
            raise
        lines = [f"the encoder alone: {error}. The format hf has the decoder, too"]
        return tower.to_monai_encoder(run.params["volume_encoder"], model, channels), lines


FORMATS: dict[str, Callable[[Run, Path, Extras], list[str]]] = {
    "hf": write_hugging_face,
    "monai": write_monai,
    "bert": export_bert.write,
    "onnx": export_graphs.write_onnx,
    "pt2": export_graphs.write_torch_export,
}


def refuse(config: Config, form: str) -> None:
    """`UserError` where a run of this configuration has no such form, before its weights are read."""
    model, hf = config.model, form not in ("monai", "bert")
    if form == "monai":
        encoder = model.volume_encoder
        if encoder.tower.to_monai_encoder is None:
            raise UserError(f"this run's volume_encoder is a {encoder.kind}, which MONAI does not have. {_HERE}")
        if problems := encoder.tower.monai_obstacles(model):
            raise UserError(
                f"MONAI cannot hold this run's volume encoder, a {encoder.kind}:\n  - " + "\n  - ".join(problems)
            )
    if form == "bert" and model.report_encoder.tower.to_hugging_face is None:
        raise UserError(f"this run's report_encoder is a {model.report_encoder.kind}, which is no BERT. {_HERE}")
    for name in export_format.TOWERS if hf else ():
        encoder = getattr(model, name)
        if encoder.tower.to_torch is None:
            hint = f"{encoder.tower.torch_hint}. " if encoder.tower.torch_hint else ""
            raise UserError(f"this run's {name} is a {encoder.kind}, which cannot be exported: {hint}{_HERE}")


_HERE = "Its checkpoints can be used here, e.g. by `mg3d evaluate` and `mg3d attend`"


def export(run: Run, out: Path, form: str = "hf", extras: Extras = Extras()) -> list[str]:  # noqa: B008
    """Writes and checks an export next to `out`, then moves it there: a failed export leaves `out` as it was."""
    extras.check(form, run.config.model.projection_dim)
    refuse(run.config, form)
    check_out(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as name:
        lines = FORMATS[form](run, Path(name), extras)
        out.mkdir(exist_ok=True)
        made = sorted(Path(name).iterdir())
        for file in made:
            file.chmod(0o644)  # libraries make some for their owner alone
        (Path(name) / FILES).write_text("".join(f"{file.name}\n" for file in made))
        earlier = (out / FILES).read_text().split("\n") if (out / FILES).exists() else []
        for file in [*made, Path(name) / FILES]:
            os.replace(file, out / file.name)
        for old in {part for part in earlier if part} - {file.name for file in made}:
            (out / Path(old).name).unlink(missing_ok=True)  # or a receiver would load what belongs to other weights
    return lines


def check_out(out: Path) -> None:
    """`UserError` where `out` holds something else than an earlier export."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    try:
        ours = export_format.MARKER in json.loads((out / "config.json").read_text())
    except (OSError, ValueError):
        ours = False
    if not ours:
        raise UserError(f"--out {out} exists and is not an earlier export: name a new folder")

"""An exported folder, or one that was fine-tuned in PyTorch and saved since, back as a model of this package.

What comes out is a folder that `init_from` starts a run from, with both towers, projections and heads, and the configuration
keys of a model that takes all of it.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict
from ml_collections import ConfigDict

from mg3d_jax import config as config_lib
from mg3d_jax import sharding
from mg3d_jax.data.tokens import load_tokenizer
from mg3d_jax.errors import UserError
from mg3d_jax.files import read_json, write_json
from mg3d_jax.interop import export_format, finetune
from mg3d_jax.interop.export_format import Probe
from mg3d_jax.interop.export_weights import save
from mg3d_jax.interop.hugging_face import TOKENIZER_FILES, weight_files
from mg3d_jax.interop.state_dict import read_weights
from mg3d_jax.registry import REPORT_TOWERS
from mg3d_jax.training import state as state_lib

MAX_LISTED = 12


@dataclass(frozen=True)
class ImportedModel:
    """Parameters under this package's names, the configuration of their model, and what was left out. `probe` is a head on
    embeddings, which is no part of a run: `mg3d export --probe` adds it again."""

    config: config_lib.Config
    params: dict[str, Any]
    arguments: dict[str, Any]  # of `MG3DConfig`
    keys: dict[str, Any]  # of the configuration, dotted, that differ from the defaults
    unused: list[str]
    probe: Probe | None = None

    def sizes(self) -> dict[str, int]:
        """Parameters of each part."""
        return {name: sum(x.size for x in flatten_dict({name: part}).values()) for name, part in self.params.items()}


def read_model(folder: Path, weights: Path | None = None, prefix: str | None = None) -> ImportedModel:
    """Reads a folder, strictly.

    Args:
        weights: a checkpoint in place of the folder's weights, of the folder's model or of what wraps it (Lightning, DDP, ...).
        prefix: of the model's tensors in it; None: found where exactly one place has them.

    Raises:
        UserError: it is no such folder, has no tokenizer, no preset of this version has its sizes, or tensors are missing,
            unknown or of another shape: all of them named.
    """
    path = folder / "config.json"
    if not path.is_file() or not export_format.is_export(read_json(path)):
        raise UserError(f"{folder}: no config.json of a model that `mg3d export --format hf` wrote")
    if not (folder / "tokenizer.json").is_file():
        raise UserError(
            f"{folder} has no tokenizer.json: copy it and tokenizer_config.json from the folder that was fine-tuned "
            "(tokenizer.save_pretrained(FOLDER) writes both)"
        )
    arguments = export_format.read_arguments(folder)
    state, left_out = read_weights(weights or weight_files(folder)[0], export_format.ROOT, prefix)
    builder, vocab = _configuration(folder, arguments), load_tokenizer(str(folder)).get_vocab_size()
    config = config_lib.typed(builder)
    setup = state_lib.build(config, vocab, sharding.make_mesh(config.mesh), steps=0)
    shapes = setup.abstract["params"]
    probe, kept = _probe(arguments, state)
    if alone := [name for name in export_format.TOWERS if not any(key.startswith(f"{name}.") for key in kept)]:
        raise UserError(
            f"{folder} has no {alone[0]}: one tower was saved alone. init_from.path takes such a folder as it is"
        )
    problems = export_format.unplaced(kept, shapes, config)
    if problems:
        more = [f"... and {len(problems) - MAX_LISTED} more"] if len(problems) > MAX_LISTED else []
        raise UserError(f"the weights of {folder} do not fit:\n  " + "\n  ".join(problems[:MAX_LISTED] + more))
    params = export_format.from_torch_state(kept, shapes, config)
    return ImportedModel(config, params, arguments, _differing(builder, folder), left_out, probe)


def _probe(arguments: Mapping[str, Any], state: dict[str, np.ndarray]) -> tuple[Probe | None, dict[str, np.ndarray]]:
    """The head on embeddings that the model has beside what is a run's, if it does, and the other tensors."""
    classes, names = arguments["probe_classes"], [f"{export_format.PROBE}.{name}" for name in ("weight", "bias")]
    shapes = (len(classes), arguments["projection_dim"]), (len(classes),)
    if not classes or any(
        name not in state or state[name].shape != shape for name, shape in zip(names, shapes, strict=True)
    ):
        return None, state  # what does not fit is named with all else that is unknown
    weight, bias = (state[name] for name in names)
    kept = {key: array for key, array in state.items() if key not in names}
    return Probe(weight, bias, tuple(classes), arguments["probe_kind"]), kept


def save_model(model: ImportedModel, source: Path, out: Path) -> None:
    """Writes what `init_from.path` takes; `UserError` where `out` holds something else than an earlier one."""
    if out.exists() and any(out.iterdir()) and not (out / "config.json").is_file():
        raise UserError(f"{out} exists and is no imported model; choose another --out.")
    out.mkdir(parents=True, exist_ok=True)
    names = [*TOKENIZER_FILES, "preprocessor_config.json"]
    for name in [name for name in names if (source / name).is_file() and source.resolve() != out.resolve()]:
        shutil.copyfile(source / name, out / name)
    arguments = model.arguments if model.probe else model.arguments | {"probe_classes": []}
    write_json(out / "config.json", arguments | {"model_type": "mg3d"})
    params, _ = export_format.split_params(model.params)
    state = export_format.torch_state(params, model.config) | (model.probe.state() if model.probe else {})
    save(state, out, dtype="float32", shard_size="1000GB", settings=json.dumps(arguments))


def _configuration(folder: Path, arguments: Mapping[str, Any]) -> ConfigDict:
    """Of a model with these arguments, unlocked."""
    config = config_lib.default().unlock()
    config.model.volume_size = tuple(arguments["volume_size"])
    finetune.start_from(config, str(folder), reports=True)
    _use_report_tower(config, arguments, folder)
    config.model.projection_dim = arguments["projection_dim"]
    config.data.max_tokens, config.data.max_sentences = arguments["max_tokens"], arguments["max_sentences"]
    alignment = config.objectives.alignment
    alignment.form = "sigmoid" if arguments["logit_bias"] else "softmax"
    views = "subsets" if arguments["direction_bias"] else "sentences"
    alignment.report_view = views if arguments["report_sentences"] else "report"
    alignment.center = alignment.center or arguments["direction_bias"]
    if arguments["report_sentences"] and arguments["report_tokens"]:
        alignment.sentence_tokens = arguments["report_tokens"]
    config.data.tokenizer = str(folder)
    if classes := arguments["head_classes"]:
        config.tasks.classification.update({"weight": 1.0, "num_labels": len(classes), "kind": arguments["head_kind"]})
    if classes := arguments["segmentation_classes"]:
        config.tasks.segmentation.update({"weight": 1.0, "num_classes": len(classes)})
        config.model.segmentation_decoder.width = arguments["segmentation_width"]
    if depth := arguments["decoder_depth"]:
        config.tasks.generation.weight = 1.0
        config.tasks.generation.findings = bool(arguments["decoder_findings"])
        config.evaluations.generation.no_repeat = arguments["decoder_no_repeat"]
        sizes = {"width": arguments["decoder_width"], "depth": depth, "num_heads": arguments["decoder_heads"]}
        config.model.report_decoder.update(sizes)
    return config


def _use_report_tower(config: ConfigDict, arguments: Mapping[str, Any], folder: Path) -> None:
    names = {"width": "report_width", "depth": "report_depth", "num_heads": "report_heads", "mlp_dim": "report_mlp_dim"}
    names |= {"type_vocab": "type_vocab", "norm_epsilon": "report_norm_eps"}
    wanted = {name: arguments[key] for name, key in names.items()}
    for preset, sizes in REPORT_TOWERS["bert"].presets.items():
        if all(getattr(sizes, name) == value for name, value in wanted.items()):
            config.model.report_encoder.update(
                {"kind": "bert", "preset": preset, "max_positions": arguments["max_positions"]}
            )
            return
    raise UserError(
        f"{folder} has a report encoder of {wanted}, which no preset of this version is "
        f"({', '.join(REPORT_TOWERS['bert'].presets)}); one of your own is registered by a plug-in (docs/towers.md)"
    )


def _differing(config: ConfigDict, folder: Path) -> dict[str, Any]:
    """Keys that the model needs and that are not the defaults'."""
    ours, defaults = (_flat(one.to_dict()) for one in (config, config_lib.default()))
    found = {key: value for key, value in ours.items() if defaults.get(key) != value}
    return found | {"init_from.path": str(folder)}


def _flat(tree: Mapping[str, Any], before: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in tree.items():
        found |= _flat(value, f"{before}{key}.") if isinstance(value, Mapping) else {f"{before}{key}": value}
    return found

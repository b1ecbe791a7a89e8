"""Our parameters under PyTorch's names and layouts, and the `config.json` of the exported model.

Towers map their own (`models/towers`); what is exported is checked against PyTorch in `export.py`.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from mg3d_jax import __version__
from mg3d_jax.config import Config
from mg3d_jax.config.parts import ModelConfig
from mg3d_jax.errors import UserError
from mg3d_jax.files import read_json
from mg3d_jax.models.towers.segmentation_weights import decoder_to_torch
from mg3d_jax.models.towers.weights import torch_state as heads_state
from mg3d_jax.objectives.base import DIRECTION_BIASES, VOLUME_BIAS

MARKER = "mg3d_jax"  # key of config.json by which an earlier export is recognised
# Of `tower_arguments`, what leaves the function of a tower as it is, or shows in shapes.
FREE_ARGUMENTS = frozenset({"pooling", "vocab_size", "max_positions"})
TOWERS = ("volume_encoder", "report_encoder")
HEAD = "classification_head"
SEGMENTATION_DECODER, SEGMENTATION_HEAD, REPORT_DECODER = "segmentation_decoder", "segmentation_head", "report_decoder"
TASKS = (SEGMENTATION_DECODER, SEGMENTATION_HEAD, REPORT_DECODER)  # in a module of their own, where a run has them
PROBE = "probe"
ROOT = "volume_projection.weight"  # a tensor that every exported model has
EXPORTED = (*TOWERS, "report_pool", "volume_projection", "report_projection", "logit_scale")


@dataclass(frozen=True)
class Probe:
    """A linear head on embeddings of length 1: `logits = embeddings @ weight.T + bias`.

    `weight` float32 `[L, k]`, `bias` `[L]`, the names of its L classes, its kind ("multi_label" or "multi_class").
    """

    weight: np.ndarray
    bias: np.ndarray
    classes: tuple[str, ...]
    kind: str

    def arguments(self) -> dict[str, Any]:
        """Those of `MG3DConfig`."""
        return {"probe_classes": list(self.classes), "probe_kind": self.kind}

    def state(self) -> dict[str, np.ndarray]:
        """Under PyTorch's names."""
        return {f"{PROBE}.weight": self.weight.astype(np.float32), f"{PROBE}.bias": self.bias.astype(np.float32)}


def is_export(content: dict[str, Any]) -> bool:
    """Is this the `config.json` of an exported model with both towers, or of one that was fine-tuned and saved since?"""
    return content.get("model_type") == "mg3d"


def read_arguments(folder: Path) -> dict[str, Any]:
    """The arguments of `MG3DConfig` of an exported folder, also of one that transformers has saved since, which leaves out
    those that have their default."""
    from mg3d_jax.interop.torch_template.configuration_mg3d import MG3DConfig  # imports transformers

    found = MG3DConfig.from_dict(read_json(folder / "config.json")).to_dict()
    return {name: found[name] for name in inspect.signature(MG3DConfig.__init__).parameters if name in found}


def head_arguments(config: Config, params: dict[str, Any], label_names: Sequence[str]) -> dict[str, Any]:
    """Those of `MG3DConfig` for the head that a run was trained with; none without one.

    Args:
        label_names: of its training data; numbers stand for them where they are not known.
    """
    if HEAD not in params:
        return {}
    count = len(params[HEAD]["bias"])
    names = list(label_names) if len(label_names) == count else [f"label {number}" for number in range(count)]
    return {"head_classes": names, "head_kind": config.tasks["classification"].kind}


def mask_classes(config: Config, mask_names: Sequence[str]) -> list[str]:
    """The classes that a run segments, background first; numbers stand for names that are not known."""
    count = config.tasks["segmentation"].num_classes
    return list(mask_names) if len(mask_names) == count else ["background", *(f"class {n}" for n in range(1, count))]


def task_arguments(config: Config, params: dict[str, Any], mask_names: Sequence[str]) -> dict[str, Any]:
    """Those of `MG3DConfig` for decoders that a run was fine-tuned with; none without one.

    Args:
        mask_names: of the classes of its training data's masks.
    """
    found: dict[str, Any] = {}
    if SEGMENTATION_HEAD in params:
        found["segmentation_classes"] = mask_classes(config, mask_names)
        found["segmentation_width"] = len(params[SEGMENTATION_HEAD]["kernel"])
    if REPORT_DECODER in params:
        decoder = config.model.report_decoder
        found |= {f"decoder_{name}": getattr(decoder, name) for name in ("width", "depth")}
        found |= {
            "decoder_heads": decoder.num_heads,
            "decoder_no_repeat": config.evaluations["generation"].no_repeat,
            "decoder_findings": len(params[REPORT_DECODER].get("finding_embedding", ())) // 2,
            "decoder_mlp_dim": int(params[REPORT_DECODER]["layers_0"]["mlp"]["up"]["kernel"].shape[1]),
        }
    return found


def split_params(params: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The part of a run's parameters that PyTorch users get, and the names of the rest (heads of the pre-training)."""
    if missing := [name for name in EXPORTED if name not in params]:
        raise UserError(f"the checkpoint lacks {missing}: it is not a checkpoint of the MG3D model")
    # The sigmoid loss has a bias, so have directions that were centred; a fine-tuned run has a head or a decoder.
    kept = [*EXPORTED, *(name for name in ("logit_bias", *DIRECTION_BIASES, HEAD, *TASKS) if name in params)]
    return {name: params[name] for name in kept}, sorted(params.keys() - set(kept))


def torch_state(params: dict[str, Any], config: Config) -> dict[str, np.ndarray]:
    """`MG3DModel.state_dict()` as contiguous float32 arrays. `params` are those that `split_params` returns."""
    state = _renamed(params, config)
    return {name: np.asarray(array, np.float32, order="C") for name, array in sorted(state.items())}


def _renamed(params: dict[str, Any], config: Config) -> dict[str, np.ndarray]:
    """The same, of arrays of any type."""
    state = heads_state({name: part for name, part in params.items() if name not in (*TOWERS, SEGMENTATION_DECODER)})
    state = {re.sub(r"(volume|report)_projection\.out", r"\1_projection", name): array for name, array in state.items()}
    state = {re.sub(r"(report_decoder\.layers)_", r"\1.", name): array for name, array in state.items()}
    if SEGMENTATION_HEAD in params:
        weight = f"{SEGMENTATION_HEAD}.weight"
        state[weight] = state[weight][..., None, None, None]  # a convolution of one voxel
        decoder = decoder_to_torch(params[SEGMENTATION_DECODER], config.model.volume_encoder.options.patch_size)
        state |= {f"{SEGMENTATION_DECODER}.{key}": array for key, array in decoder.items()}
    for name in TOWERS:
        found = getattr(config.model, name).tower.to_torch(params[name], config.model)
        state |= {f"{name}.{key}": array for key, array in found.items()}
    return state


def unplaced(state: dict[str, np.ndarray], shapes: dict[str, Any], config: Config) -> list[str]:
    """What keeps exported arrays from being the whole model of `config`: keys that are missing, unknown or of another shape,
    with the shapes."""
    kept, _ = split_params(shapes)
    blanks = {name: np.zeros(leaf.shape, np.int8) for name, leaf in flatten_dict(kept, sep="/").items()}
    expected = {key: array.shape for key, array in _renamed(unflatten_dict(blanks, sep="/"), config).items()}
    return [
        *(f"{key} {list(shape)}: missing in the file" for key, shape in expected.items() if key not in state),
        *(f"{key} {list(state[key].shape)}: unknown to the model" for key in state if key not in expected),
        *(
            f"{key}: {list(state[key].shape)} in the file, {list(shape)} in the model"
            for key, shape in expected.items()
            if key in state and state[key].shape != shape
        ),
    ]


def from_torch_state(
    state: dict[str, np.ndarray], shapes: dict[str, Any], config: Config, wanted: Callable[[str], bool] = lambda _: True
) -> dict[str, Any]:
    """Exported arrays as parameters of `config`'s model; those that an export does not hold are left out.

    The mapping only renames arrays and moves their elements, so it is turned back by sending the elements' numbers through
    it. An array that has another size than the model's comes as it is where nothing moves its elements (learned positions),
    and is a `UserError` with both shapes elsewhere.

    Args:
        shapes: the tree of the model's parameters: arrays, or what has their shapes.
        wanted: names of parameters, "a/b/c", that are to be read: others may be of any size, and are left out where they are.
    """
    kept, _ = split_params(shapes)
    if wrong := [name for name in TOWERS if getattr(config.model, name).tower.to_torch is None]:
        raise UserError(f"an export cannot be read into this model: its {wrong[0]} has no form in PyTorch")
    sizes = {name: tuple(leaf.shape) for name, leaf in flatten_dict(kept, sep="/").items()}
    starts = dict(zip(sizes, np.cumsum([0, *map(prod, sizes.values())]), strict=False))
    numbers = {name: start + np.arange(prod(sizes[name])).reshape(sizes[name]) for name, start in starts.items()}
    flat, found = np.full(sum(map(prod, sizes.values())), np.nan, np.float32), {}
    for key, places in _renamed(unflatten_dict(numbers, sep="/"), config).items():
        if key not in state or not np.issubdtype(places.dtype, np.integer):  # fixed positions are no parameters
            continue
        name = next(reversed([name for name, start in starts.items() if start <= places.min()]))
        if state[key].shape == places.shape:
            flat[places] = state[key]
        elif np.array_equal(places, numbers[name]):
            found[name] = state[key]
        elif wanted(name):
            raise UserError(
                f"{key} of the export is {list(state[key].shape)}, the model's {name} needs {list(places.shape)}: set "
                "preset, patch_size and windows of the model to the export's (its config.json)"
            )
    for name, places in numbers.items():
        if name not in found and not np.isnan(flat[places]).any():
            found[name] = flat[places]
    return unflatten_dict(found, sep="/")


def tower_arguments(params: dict[str, Any], model: ModelConfig) -> dict[str, dict[str, Any]]:
    """The arguments of `MG3DConfig` that either tower sets; those that have no form in PyTorch set none."""
    found = {}
    for name in TOWERS:
        arguments = getattr(model, name).tower.torch_arguments
        found[name] = {} if arguments is None else arguments(params[name], model)
    return found


def torch_config(config: Config, params: dict[str, Any], spacing: Sequence[float], policy: str) -> dict[str, Any]:
    """The arguments of `MG3DConfig`."""
    arguments: dict[str, Any] = {
        "volume_size": list(config.model.volume_size),
        "spacing": [float(mm) for mm in spacing],
        "policy": policy,
        "orientation": "RAS",
        "windows": [list(window) for window in config.data.windows],
    }
    for found in tower_arguments(params, config.model).values():
        arguments |= found
    views = config.objectives["alignment"].report_view != "report"
    return arguments | {
        "max_tokens": config.data.max_tokens,
        "max_sentences": config.data.max_sentences,
        "report_sentences": 1 if views else 0,
        "report_tokens": config.text_tokens(),
        "projection_dim": config.model.projection_dim,
        "logit_bias": "logit_bias" in params,
        "direction_bias": VOLUME_BIAS in params,
    }


def hugging_face_config(
    arguments: dict[str, Any], *, step: int, config_hash: str, tasks: bool = False, dtype: str = "float32"
) -> dict[str, Any]:
    """`config.json`: the arguments, what transformers needs to find the code, and where the weights come from.

    Args:
        tasks: the model has decoders, whose module stands in a file of its own.
        dtype: of the stored weights, "float32" or "bf16".
    """
    name, file = ("MG3DTaskModel", "modeling_mg3d_tasks") if tasks else ("MG3DModel", "modeling_mg3d")
    return {
        "model_type": "mg3d",
        "architectures": [name],
        "auto_map": {
            "AutoConfig": "configuration_mg3d.MG3DConfig",
            "AutoModel": f"{file}.{name}",
            "AutoModelForZeroShotImageClassification": f"{file}.{name}",
            "AutoModelForTextEncoding": "modeling_mg3d.MG3DTextModel",
        },
        "custom_pipelines": {
            "zero-shot-image-classification": {
                "impl": "pipeline_mg3d.MG3DZeroShotPipeline",
                "pt": ["AutoModelForZeroShotImageClassification"],
                "type": "multimodal",
            }
        },
        "torch_dtype": "bfloat16" if dtype == "bf16" else "float32",
        **arguments,
        MARKER: {"version": __version__, "step": step, "config_hash": config_hash},
    }

"""What a new run can start from, as arrays under this package's parameter names: a run, an imported tower, an export."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict

from mg3d_jax.config import Config
from mg3d_jax.config.parts import InitConfig, ModelConfig
from mg3d_jax.data.tokens import ReportTokenizer, load_tokenizer
from mg3d_jax.errors import UserError
from mg3d_jax.files import read_json
from mg3d_jax.interop import export_format
from mg3d_jax.interop.hugging_face import check_vocabulary, load_checkpoint, weight_files
from mg3d_jax.interop.state_dict import read_state_dict
from mg3d_jax.interop.tower import Tower, at_volume_size, check_fields, load_tower
from mg3d_jax.training.branch import folder_and_step
from mg3d_jax.training.restore import restore_run
from mg3d_jax.training.run_folder import CONFIG_FILE, TOKENIZER_FOLDER
from mg3d_jax.training.state import Setup

ENCODERS = ("volume_encoder", "report_encoder")
# Fields of a tower's module that leave its function as it is, or show in the shapes of its parameters.
FREE_FIELDS = {
    "volume_size", "channels", "pooling", "dropout", "dtype", "remat", "frozen_layers", "attention_backend", "parent",
    "name", "vocab_size", "max_positions", "layer_scale",
}  # fmt: skip
Params = dict[str, np.ndarray]  # by name, "volume_encoder/stack/..."


@dataclass(frozen=True)
class Source:
    """Parameters to start from.

    Attributes:
        label: what it is called in messages.
        params: float32 arrays, for the volume size of the new run. `resized`: names of those that were adapted to it.
        misfits: by encoder, what it computes in another way than the new run's, where shapes do not show it: number of
            heads, form of GELU, ...
        vocabulary: token -> id; None where it has none or was compared already. `tokenizer`: the remedy, a `data.tokenizer`.
        complete: an encoder whose parameters must all be there, but for those of `fresh`.
    """

    label: str
    params: Params
    resized: frozenset[str] = frozenset()
    misfits: Mapping[str, list[str]] = field(default_factory=dict)
    vocabulary: Mapping[str, int] | None = None
    tokenizer: str = ""
    complete: str = ""
    fresh: tuple[str, ...] = ()


def open_source(path: str, setup: Setup, tokenizer: ReportTokenizer) -> Source:
    """What `init_from.path` names, for the new run of `setup`. `UserError` where it is none of the three."""
    folder, step = folder_and_step(path)
    if (folder / "tower.json").is_file():
        reads_text = load_tower(folder).kind in setup.config.model.report_encoder.towers()
        encoder = "report_encoder" if reads_text else "volume_encoder"
        return from_tower(path, encoder, setup.config, tokenizer, "init_from.path")
    if (folder / "config.json").is_file() and export_format.is_export(read_json(folder / "config.json")):
        return _from_export(folder, setup)
    if (folder / CONFIG_FILE).is_file() and (folder / TOKENIZER_FOLDER).is_dir():
        return _from_run(folder, step, setup.config, tokenizer.vocab_size)
    raise UserError(
        f"init_from.path = {path!r} is no run of `mg3d train` (RUN or RUN@STEP), no folder written by `mg3d import`, and no "
        "folder written by `mg3d export`"
    )


def _from_run(folder: Path, step: int | None, config: Config, vocab_size: int) -> Source:
    """The averaged parameters where the run keeps an average: those that its evaluations measured."""
    run = restore_run(folder, step)
    tree = jax.tree.map(lambda x: np.asarray(x, np.float32), jax.device_get(run.params))
    theirs = _fields(run.config.model, len(run.config.data.windows), run.tokenizer.get_vocab_size())
    ours = _fields(config.model, len(config.data.windows), vocab_size)
    misfits = {
        name: _differences(
            {key: value for key, value in theirs[name].items() if key not in FREE_FIELDS}, ours[name]
        )
        for name in ENCODERS
    }  # fmt: skip
    volume = Tower(run.config.model.volume_encoder.kind, theirs["volume_encoder"], tree["volume_encoder"], str(folder))
    params, resized = _adapted(tree, volume, config.model)
    label, text = f"{folder} (step {run.step})", str(folder / TOKENIZER_FOLDER)
    return Source(label, params, resized, misfits, run.tokenizer.get_vocab(), text)


def from_tower(path: str, encoder: str, config: Config, tokenizer: ReportTokenizer, key: str) -> Source:
    """An imported tower, or a checkpoint of the Hugging Face hub by its folder or name. `key` names it in messages.

    `UserError` where its kind, its settings or its vocabulary are not those of the config.
    """
    options = getattr(config.model, encoder)
    tower = _tower(path, encoder, config, tokenizer.tokenizer.get_vocab(), key)
    inputs = len(config.data.windows) if encoder == "volume_encoder" else tokenizer.vocab_size
    x, y, z = config.model.volume_size
    check_fields(at_volume_size(tower, (x, y, z)), options.tower.build(config.model, inputs))
    params, resized = _adapted({encoder: tower.params}, tower, config.model)
    fresh = tuple(f"{encoder}/{start}" for start in options.tower.fresh)
    return Source(path, params, resized, complete=encoder, fresh=fresh)


def _tower(path: str, encoder: str, config: Config, vocabulary: dict[str, int], key: str) -> Tower:
    options = getattr(config.model, encoder)
    if not (Path(path) / "tower.json").is_file():
        form = next((form for form in options.tower.forms.values() if form.folder), None)
        if form is None:
            raise UserError(f"{key} = {path!r} is no folder written by `mg3d import`")
        loaded = load_checkpoint(path, form, vocabulary)
        return Tower(options.kind, loaded.fields, loaded.params, path, loaded.unused)
    tower = load_tower(Path(path))
    if tower.kind != options.kind:
        raise UserError(f"{key} = {path!r} holds a {tower.kind}, a {options.kind} is needed")
    if encoder == "report_encoder":
        if tower.encoder["vocab_size"] != len(vocabulary):
            raise UserError(
                f"{key} = {path!r} has {tower.encoder['vocab_size']} tokens, the tokenizer of data.tokenizer = "
                f"{config.data.tokenizer!r} has {len(vocabulary)}: use the checkpoint's own tokenizer"
            )
        check_vocabulary(Path(path), tower.encoder["vocab_size"], vocabulary)  # `mg3d import` has copied its tokenizer
    return tower


def _from_export(folder: Path, setup: Setup) -> Source:
    """What `mg3d export` wrote for PyTorch, turned back."""
    arguments, model = export_format.read_arguments(folder), setup.config.model
    ours = export_format.tower_arguments(setup.abstract["params"], model)
    misfits = {name: _differences(arguments, ours[name], export_format.FREE_ARGUMENTS) for name in ENCODERS}
    weights = read_state_dict(weight_files(folder)[0])
    tree = export_format.from_torch_state(
        weights, setup.abstract["params"], setup.config, _taken(setup.config.init_from)
    )
    fields = {"volume_size": tuple(arguments["volume_size"]), "patch_size": tuple(arguments["patch_size"])}
    volume = Tower(model.volume_encoder.kind, fields, tree.get("volume_encoder", {}), str(folder))
    params, resized = _adapted(tree, volume, model)
    return Source(str(folder), params, resized, misfits, load_tokenizer(str(folder)).get_vocab(), str(folder))


def _taken(init: InitConfig) -> Callable[[str], bool]:
    """Does a run take a parameter of this name? Of a pattern that is no regular expression `warm_start` speaks."""

    def matches(patterns: Iterable[str], name: str) -> bool:
        with suppress(re.error):
            return any(re.fullmatch(pattern, name) for pattern in patterns)
        return True

    return lambda name: matches(init.take, name) and not matches(init.leave, name)


def _fields(model: ModelConfig, channels: int, vocab_size: int) -> dict[str, dict[str, Any]]:
    """Kind and all fields of the modules of both towers."""
    modules = {
        "volume_encoder": model.volume_encoder.tower.build(model, channels),
        "report_encoder": model.report_encoder.tower.build(model, vocab_size),
    }
    return {
        encoder: {"kind": getattr(model, encoder).kind}
        | {name: getattr(module, name) for name in module.__dataclass_fields__}
        for encoder, module in modules.items()
    }


def _differences(theirs: Mapping[str, Any], ours: Mapping[str, Any], free: frozenset[str] = frozenset()) -> list[str]:
    names = [name for name in theirs if name in ours and name not in free]
    found = [(name, theirs[name], ours[name]) for name in names if theirs[name] != ours[name]]
    return [f"{name}: {a!r} in the checkpoint, {b!r} in the model" for name, a, b in found]


def _adapted(tree: Mapping[str, Any], tower: Tower, model: ModelConfig) -> tuple[Params, frozenset[str]]:
    """The parameters by name, those of a volume tower for the model's volumes, and the names of what that changed."""
    before: Params = flatten_dict(dict(tree), sep="/")
    if "volume_encoder" not in tree or tower.kind != model.volume_encoder.kind:
        return before, frozenset()
    x, y, z = model.volume_size
    tree = dict(tree) | {"volume_encoder": at_volume_size(tower, (x, y, z)).params}
    after: Params = flatten_dict(tree, sep="/")
    return after, frozenset(name for name in after if after[name] is not before[name])

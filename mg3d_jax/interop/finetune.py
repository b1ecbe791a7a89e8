"""What the recipes of `configs/downstream` have in common: a model like the one that they start from, with a task on top.

config = finetune.begin(arg, "luna16", volume_size=(64, 64, 64), windows=((-1000.0, 600.0),), heads=("classification_head",))
config.tasks.classification.weight = 1.0
...
return config.lock()
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from mg3d_jax import config as config_lib
from mg3d_jax import options as options_lib
from mg3d_jax.config.parts import VolumeEncoderConfig, options_of
from mg3d_jax.errors import UserError
from mg3d_jax.files import read_json
from mg3d_jax.interop import export_format
from mg3d_jax.interop.tower import Tower, load_tower
from mg3d_jax.objectives.base import enabled
from mg3d_jax.registry import REPORT_TOWERS, VOLUME_TOWERS
from mg3d_jax.training.branch import folder_and_step
from mg3d_jax.training.state import has_direction_bias

SMALL = "small"  # of a recipe's argument: the size of its miniature
PROBE = "probe"  # the same: the volume encoder is frozen
SMALL_SIZE = (48, 48, 32)  # voxels; as in configs/quickstart.py
NO_PRESET = "(none of this version has its sizes: register one by a plug-in, docs/towers.md)"
Windows = tuple[tuple[float, float], ...]


def begin(
    arg: str,
    name: str,
    *,
    volume_size: tuple[int, int, int],
    windows: Windows,
    heads: tuple[str, ...],
    reports: bool = False,
) -> ConfigDict:
    """The unlocked configuration of a recipe, without a task: no objective is on, no evaluation is measured.

    Args:
        arg: what stands behind the `:` of `--config`, joined by commas: what to start from (a run, RUN@STEP, a folder of `mg3d
            import` or of `mg3d export`; `mg3d finetune --init-from` puts it there), `small` for a miniature, `probe` for heads
            on a frozen volume encoder (a linear probe).
        name: of the run.
        volume_size: of the prepared data, voxels; with `small` it is `SMALL_SIZE`.
        windows: HU windows of a model that starts from nothing, or from a tower with as many channels. One that starts from a
            run keeps that run's.
        heads: modules of the task, which are trained with the volume encoder; all else stays.
        reports: the task reads reports: the report encoder and all else that both have is taken, not the volume encoder alone.

    Raises:
        UserError: the source is none of these, or no preset of this version has its sizes.
    """
    words = [word for word in arg.split(",") if word]
    small = SMALL in words
    sources = [word for word in words if word not in (SMALL, PROBE)]
    if len(sources) > 1:
        raise UserError(f"configs/downstream/{name}.py:{arg}: {sources} are several things to start from: give one")
    config = config_lib.default().unlock()
    config.name = name
    if small:
        config_lib.use_small_model(config)
        config.data.windows = ((-1000.0, 1000.0),)
        config.data.batch_size = 16
    else:
        config.data.windows = windows
        config.data.batch_size = 32
    if not reports:
        config.model.report_encoder.preset = "pico"  # not read
    size = SMALL_SIZE if small else volume_size
    if sources:
        start_from(config, sources[0], reports=reports, volume_size=size)
    config.model.volume_size = size
    for objective in config.objectives.values():
        objective.weight = 0.0
    for evaluation in config.evaluations.values():
        evaluation.every = -1
    config.optimizer.freeze = (f"(?!volume_encoder/|{'|'.join(f'{head}/' for head in heads)}).*",)
    _schedule(config, small=small)
    if PROBE in words:
        config.model.volume_encoder.frozen_layers = -1
        config.optimizer.update({"learning_rate": 1e-2, "layer_decay": 1.0, "weight_decay": 0.0})
    return config


def classification(
    arg: str, name: str, *, volume_size: tuple[int, int, int], windows: Windows, **options: Any
) -> ConfigDict:
    """The recipe of a classification task, locked. Arguments as for `begin`; `options` are those of `tasks.classification`."""
    config = begin(arg, name, volume_size=volume_size, windows=windows, heads=("classification_head",))
    config.tasks.classification.update({"weight": 1.0, "balance": True} | options)
    config.evaluations.classification.every = 0
    config.data.augment.shift = 2 if SMALL in arg.split(",") else 6
    # The head starts at zero, on features that hardly differ between patients: at the tower's rate it would wait for it.
    config.optimizer.learning_rate_multipliers = (("classification_head/.*", 10.0), (".*", 1.0))
    return config.lock()


def _schedule(config: ConfigDict, *, small: bool) -> None:
    """Rates and decay that the literature fine-tunes a ViT-B with (He et al. 2022)."""
    config.optimizer.update({
        "learning_rate": 1e-3 if small else 5e-4, "b2": 0.999, "layer_decay": 0.75, "weight_decay": 0.05,
    })  # fmt: skip
    config.schedule.kind = "cosine"
    config.schedule.warmup_percent = 5.0
    config.training.update({"steps": 120 if small else 10_000, "checkpoint_every": 60 if small else 500})


def start_from(
    config: ConfigDict, source: str, *, reports: bool = False, volume_size: tuple[int, int, int] | None = None
) -> None:
    """Gives an unlocked configuration the model of `source`, and names it in `init_from`.

    Args:
        volume_size: of the new run's volumes; the pooling "flatten", a layer of so many tokens, is kept where the source's are
            of that size, and is a mean elsewhere.
    """
    folder, _ = folder_and_step(source)
    config.init_from.path = source
    config.init_from.take = (".*",) if reports else ("volume_encoder/.*",)
    if (folder / "tower.json").is_file():
        _like_tower(config, folder)
    elif (folder / "config.json").is_file() and export_format.is_export(read_json(folder / "config.json")):
        _like_export(config, folder, volume_size)
    elif (folder / "config.json").is_file() and (folder / "tokenizer").is_dir():
        like_run(config, folder, reports=reports, volume_size=volume_size)
    else:
        raise UserError(
            f"{source!r} is nothing to start from: no run of `mg3d train` (RUN or RUN@STEP), no folder written by `mg3d "
            "import`, and none written by `mg3d export`"
        )


def like_run(
    config: ConfigDict, folder: Path, *, reports: bool = True, volume_size: tuple[int, int, int] | None = None
) -> None:
    """Model, windows and plug-ins as in a run, with `reports` also its tokenizer and how it reads texts. Nothing is frozen.

    Args:
        volume_size: as for `start_from`; None: the run's own.
    """
    source = config_lib.read(folder / "config.json")
    theirs = config_lib.to_dict(source)
    theirs["model"]["volume_encoder"]["pooling"] = _pooling(
        theirs["model"]["volume_encoder"]["pooling"], theirs["model"]["volume_size"], volume_size
    )
    theirs["model"]["volume_encoder"] |= {"pretrained": "", "frozen_layers": 0}
    theirs["model"]["report_encoder"]["pretrained"] = ""
    config.plugins = theirs["plugins"]
    config.data.windows = theirs["data"]["windows"]
    if not reports:
        config.model.volume_encoder.update(theirs["model"]["volume_encoder"])
        config.model.dtype = theirs["model"]["dtype"]
        return
    config.model.update(theirs["model"])
    for name in ("max_tokens", "max_sentences", "vocab_size"):
        config.data[name] = theirs["data"][name]
    alignment = theirs["objectives"]["alignment"]
    for name in ("form", "temperature", "report_view", "sentence_tokens"):
        config.objectives.alignment[name] = alignment[name]
    config.tasks.vocabulary.direction_bias = any(map(has_direction_bias, enabled(source.objectives, source.tasks)))
    config.data.tokenizer = str(folder / "tokenizer")


def _pooling(pooling: str, theirs: Sequence[int], volume_size: Sequence[int] | None) -> str:
    """That of a source with volumes of size `theirs`, on volumes of `volume_size`."""
    other_size = volume_size is not None and tuple(theirs) != tuple(volume_size)
    return "mean" if pooling == "flatten" and other_size else pooling


def tokens_alone(config: ConfigDict) -> None:
    """For tasks that read the tokens: their volumes may be of another size than the layer of the pooling "flatten" is."""
    if config.model.volume_encoder.pooling == "flatten":
        config.model.volume_encoder.pooling = "mean"


def _like_tower(config: ConfigDict, folder: Path) -> None:
    tower = load_tower(folder)
    if tower.kind not in VOLUME_TOWERS:
        raise UserError(f"{folder} holds a {tower.kind}, which reads reports: fine-tuning starts from a volume tower")
    channels = tower.encoder.get("channels", len(config.data.windows))
    if channels != len(config.data.windows):
        raise UserError(
            f"{folder} reads {channels} channels, the recipe has {len(config.data.windows)} windows: set data.windows to as "
            "many"
        )
    _use_tower(config, tower.kind, tower.encoder, str(folder))


def _like_export(config: ConfigDict, folder: Path, volume_size: tuple[int, int, int] | None) -> None:
    about = export_format.read_arguments(folder)
    theirs = {"width": "volume_width", "depth": "volume_depth", "num_heads": "volume_heads"}
    names = {"patch_size", "stem", "positions", "num_registers", "qk_norm", "exact_gelu"}
    fields = {name: about[key] for name, key in theirs.items()} | {name: about[name] for name in names}
    fields |= {"mlp_ratio": about["volume_mlp_dim"] / about["volume_width"]}
    fields |= {"norm_epsilon": about["volume_norm_eps"], "layer_scale": 0.1 if about["layer_scale"] else 0.0}
    config.data.windows = options_lib.tuples(about["windows"])
    _use_tower(config, "vit", fields, str(folder))
    config.model.volume_encoder.pooling = _pooling(about["pooling"], about["volume_size"], volume_size)


def _use_tower(config: ConfigDict, kind: str, fields: Mapping[str, Any], label: str) -> None:
    """Kind, options and the preset of a tower whose module has these fields. `UserError` where no preset has its sizes."""
    tower, encoder = VOLUME_TOWERS[kind], config.model.volume_encoder
    defaults = options_lib.to_dict(VolumeEncoderConfig())  # options of other kinds stay at theirs
    encoder.update({"kind": kind} | {name: defaults[name] for name in defaults if name not in ("kind", "pooling")})
    own = options_lib.types_of(options_of(tower))
    given = {name: options_lib.tuples(value) for name, value in fields.items() if name in own}
    encoder.update({name: value or type(defaults[name])(0) for name, value in given.items()})
    for preset in tower.presets:
        encoder.preset = preset
        model = config_lib.typed(config).model
        module = tower.build(model, len(config.data.windows))
        shared = [name for name in fields if name != "volume_size" and hasattr(module, name)]
        if all(options_lib.tuples(fields[name]) == getattr(module, name) for name in shared if name != "layer_scale"):
            return
    raise UserError(
        f"{label} is a {kind} of {dict(fields)}, which no preset of this version is ({', '.join(tower.presets)}); one of your "
        "own is registered by a plug-in (docs/towers.md)"
    )


def keys_of(tower: Tower, out: Path) -> dict[str, Any]:
    """The configuration keys, dotted, with which a run takes an imported tower; for sizes that no preset of this version has,
    `preset` says so."""
    encoder = "volume_encoder" if tower.kind in VOLUME_TOWERS else "report_encoder"
    config, before = config_lib.default().unlock(), f"model.{encoder}"
    found: dict[str, Any] = {f"{before}.kind": tower.kind, f"{before}.pretrained": str(out)}
    if encoder == "report_encoder":
        keys = {"width": "width", "depth": "depth", "num_heads": "num_heads", "mlp_dim": "mlp_dim"}
        keys |= {"type_vocab": "type_vocab", "norm_epsilon": "norm_epsilon"}
        sizes = {name: tower.encoder[name] for name in keys}
        presets = REPORT_TOWERS[tower.kind].presets
        fitting = [
            name for name, one in presets.items() if all(getattr(one, key) == value for key, value in sizes.items())
        ]
        found[f"{before}.preset"] = fitting[0] if fitting else NO_PRESET
        return found | {f"{before}.max_positions": tower.encoder["max_positions"], "data.tokenizer": str(out)}
    channels = tower.encoder.get("channels", 1)
    if channels != len(config.data.windows):
        config.data.windows = tuple((-1000.0, 1000.0) for _ in range(channels))
        found["data.windows"] = f"as many as it has channels: {channels}"
    defaults = options_lib.to_dict(VolumeEncoderConfig())
    try:
        _use_tower(config, tower.kind, tower.encoder, str(out))
    except UserError:
        found[f"{before}.preset"] = NO_PRESET
        return found
    now = config.model.volume_encoder
    same = ("kind", "pretrained")
    found |= {f"{before}.{key}": now[key] for key in defaults if key not in same and now[key] != defaults[key]}
    return found


def use_report_decoder(config: ConfigDict, arg: str, *, findings: int = 0) -> None:
    """Switches the task `generation` on. The pre-trained encoder moves slower than the decoder, which starts from nothing.

    Args:
        findings: labels of the records, which a classification head learns and the decoder reads; 0: neither.
    """
    small = SMALL in arg.split(",")
    config.tasks.generation.weight = 1.0
    if findings:
        config.tasks.generation.findings = True
        config.tasks.classification.update({"weight": 1.0, "num_labels": findings, "balance": True})
    else:
        tokens_alone(config)
    config.data.update({"max_tokens": 256, "max_sentences": 48, "vocab_size": 1000 if small else 4096})
    config.evaluations.generation.no_repeat = 16  # else a decoder that is unsure says one phrase again and again
    if small:
        config.model.report_decoder.update({"width": 128, "depth": 2, "num_heads": 4})
        config.training.steps = 1000  # 200 are too few (docs/generation.md)
    pretrained = bool(config.init_from.path)
    config.optimizer.learning_rate = 2e-3 if small else 3e-4
    config.optimizer.learning_rate_multipliers = (
        ("volume_encoder/.*", 0.2 if pretrained else 1.0),
        *([("classification_head/.*", 5.0)] if findings else []),  # it starts at zero, as in `classification`
        (".*", 1.0),
    )
    config.optimizer.layer_decay = 1.0

"""The default configuration, loading with overrides, and validation before anything is built.

A config file is Python with `get_config(arg)` returning an `ml_collections.ConfigDict`; it starts from `default()` and
changes what it must. On the command line `--config FILE[:arg] --config.optimizer.learning_rate=1e-4` overrides any key.
`validate` checks everything that can be known without data or devices, so that a mistake costs seconds and not a queue slot.
"""

from __future__ import annotations

import argparse
import difflib
import hashlib
import json
import math
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_flags

from mg3d_jax.errors import UserError
from mg3d_jax.models import presets

DTYPES = ("float32", "bfloat16")
REMAT_POLICIES = ("none", "minimal", "full", "offload")
SCHEDULES = ("linear", "cosine", "constant")


def _group(**values: Any) -> ConfigDict:
    return ConfigDict(values)


def default() -> ConfigDict:
    """Every key there is, with the paper's setting where the paper has one (see the design notes in docs/)."""
    config = ConfigDict()
    config.name = "mg3d"
    config.seed = 0
    config.data = _group(
        train=(),  # folders made by `mg3d prepare`; several are concatenated
        valid=(),  # held-out folder(s) for the loss during training; may stay empty
        batch_size=64,  # global: all devices of all processes together
        max_patients=0,  # train on the first K patients only (nested subsets); 0 = all
        tokenizer="train",  # "train": a WordPiece tokenizer of the training reports; else a Hugging Face name or folder
        vocab_size=4096,  # of a tokenizer trained here
        max_tokens=250,
        max_sentences=32,
        windows=((-1000.0, 1000.0),),  # HU windows, one channel each, scaled to [0, 1] on the device
        shuffle_reports=False,  # control experiment: pairs every volume with another patient's report
        workers=0,  # grain worker processes per host; 0 reads in the main process
        read_threads=4,
        augment=_group(shift=0, scale=0.0, offset=0.0, noise=0.0),  # voxels; relative; HU; HU standard deviation
    )
    config.model = _group(
        volume_size=(128, 128, 96),
        volume_encoder=_group(
            preset="b",
            patch_size=(16, 16, 16),
            stem="linear",
            positions="sincos",
            pooling="attention",  # "attention", "mean", or "flatten": a linear layer over all tokens, as CT-CLIP
            num_registers=0,
            qk_norm=False,
            layer_scale=0.0,
            dropout=0.0,
            pretrained="",  # a folder written by `mg3d import monai-vit`
        ),
        report_encoder=_group(
            preset="base",
            max_positions=512,
            dropout=0.0,
            pretrained="",  # a BERT-type checkpoint: a folder or a name on the hub; its tokenizer goes to data.tokenizer
        ),
        projection_dim=512,
        fusion=_group(depth=2, kind="attention"),  # "attention", or "gate": the relevance gate of MG-3D's release
        voxel_decoder=_group(width=384, depth=2, num_heads=6),
        matching_dim=128,  # width of the sentence-conditioned volume features
        dtype="bfloat16",
        remat="minimal",
        attention="auto",
    )
    config.objectives = _group(
        alignment=_group(
            weight=1.0,
            temperature=0.1,
            learn_temperature=False,
            report_view="sentences",  # "report": the whole report; "sentences": random sentences of it, each by itself
            report_sentences=8,  # how many to draw per report and step, for the view "sentences"
            sentence_tokens=48,  # length of one, [CLS] and [SEP] included; what does not fit is cut
            center=True,  # subtract the mean of the batch from the embeddings; the projections' biases track it
            form="softmax",  # "softmax": InfoNCE; "sigmoid": SigLIP, with a learned bias
            volume_report_weight=1.0,  # pair (a): volume against report
            fused_weight=0.0,  # pair (b): fused patient against its two embeddings
            block_size=0,  # columns of the similarity matrix at a time; 0 chooses by size
        ),
        volume_reconstruction=_group(
            weight=0.0,
            mask_ratio=0.5,
            masking="random",  # "random", or "nested": whole cells of 2x2x2 patches, then patches in the other cells
            normalize_target=False,  # per patch
            read_report=True,  # False: a plain masked autoencoder
        ),
        report_reconstruction=_group(weight=0.0, mask_ratio=0.15, sentence_weight=0.1),
        matching=_group(
            weight=0.0,
            high=0.9,  # report-side cosine from which sentences of two patients attract
            low=0.6,  # and up to which they repel
            average="pairs",  # "pairs" of sentences, or "patients": the release's
            # What is compared on the report side: means of the report encoder's output ("encoder") or of its input
            # ("embeddings"), which are fixed only where the encoder is frozen; or "words", fixed random word vectors.
            sentence_source="encoder",
            block_size=0,  # patients at a time; 0 chooses by size
        ),
        discrimination=_group(weight=0.0, temperature=0.1, block_size=0),
    )
    config.optimizer = _group(
        name="adamw",
        learning_rate=1e-4,
        b1=0.9,
        b2=0.98,
        weight_decay=0.05,
        clip_norm=1.0,
        accumulation=1,  # micro-batches per step
        gradient_cache=False,  # with accumulation > 1: the exact gradient of the whole batch, for one more forward pass
        learning_rate_multipliers=((".*", 1.0),),  # (regex, factor): the first match counts, every parameter must match
        no_weight_decay=(".*(bias|scale|position|embedding|pooling_query|logit_scale|logit_bias).*",),
        freeze=(),  # regexes of parameters that are not trained
    )
    config.schedule = _group(
        kind="linear", warmup_steps=0, warmup_percent=5.0, cooldown_percent=20.0, final_fraction=0.0
    )
    config.training = _group(
        steps=0,  # exactly one of steps, epochs, samples is set
        epochs=0.0,
        samples=0,
        log_every=10,
        validate_every=0,  # held-out loss every so many steps; 0 = only at the end
        checkpoint_every=100,
        keep_checkpoints=2,
    )
    config.mesh = _group(data=-1, fsdp=1, tensor=1)
    return config.lock()


# Which objectives are on, by name: the whole method, and the baselines of the same family on equal footing.
OBJECTIVE_PRESETS: dict[str, dict[str, Any]] = {
    "clip": {"alignment.weight": 1.0},
    "siglip": {"alignment.weight": 1.0, "alignment.form": "sigmoid", "alignment.learn_temperature": True},
    "mae": {"volume_reconstruction.weight": 1.0, "volume_reconstruction.read_report": False},
    "mg3d": {
        "alignment.weight": 0.1,
        "alignment.fused_weight": 1.0,
        "volume_reconstruction.weight": 1.0,
        "report_reconstruction.weight": 1.0,
        "matching.weight": 0.1,
        "discrimination.weight": 0.1,
    },
}


def use_objectives(config: ConfigDict, name: str) -> None:
    """Switches on the objectives of a preset, with the paper's weights, and all others off."""
    if name not in OBJECTIVE_PRESETS:
        raise UserError(f"objectives {name!r} are unknown: choose one of {', '.join(OBJECTIVE_PRESETS)}")
    off = {f"{objective}.weight": 0.0 for objective in config.objectives}
    config.objectives.update_from_flattened_dict(off | OBJECTIVE_PRESETS[name])


def add_arguments(parser: argparse.ArgumentParser, *, required: bool = True) -> None:
    """Declares `--config`; overrides `--config.KEY=VALUE` are parsed by `load`."""
    parser.add_argument(
        "--config", required=required, metavar="FILE[:ARG]", help="config file; override keys with --config.KEY=VALUE"
    )


def parse(parser: argparse.ArgumentParser, argv: list[str]) -> tuple[argparse.Namespace, ConfigDict]:
    """Parses a command's own options and its config with overrides; anything unknown is an error."""
    overrides = [a for i, a in enumerate(argv) if a.startswith("--config.") or (i and _is_value(argv, i))]
    args = parser.parse_args(
        [a for i, a in enumerate(argv) if not (a.startswith("--config.") or (i and _is_value(argv, i)))]
    )
    return args, load(args.config, overrides)


def _is_value(argv: list[str], i: int) -> bool:
    """Is `argv[i]` the value of an override written as two words: `--config.seed 3`?"""
    return argv[i - 1].startswith("--config.") and "=" not in argv[i - 1] and not argv[i].startswith("--")


def load(path: str, overrides: list[str] | None = None) -> ConfigDict:
    """Loads `FILE[:ARG]` and applies `["--config.a.b=value", ...]`. `UserError` for a missing file, key or wrong type."""
    file = path.partition(":")[0]
    if not Path(file).is_file():
        raise UserError(f"config file {file!r} does not exist. Write --config FILE[:ARG], e.g. configs/quickstart.py")
    argv = ["mg3d", f"--config={path}", *(overrides or [])]
    values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", flag_values=values, sys_argv=argv)
    try:
        values(argv)
        return values.config
    except (AttributeError, KeyError) as error:
        raise UserError(_unknown_key(path, overrides or [], error)) from error
    except (flags.Error, TypeError, ValueError) as error:
        raise UserError(f"config {path}: {error}") from error


def _unknown_key(path: str, overrides: list[str], error: Exception) -> str:
    known = sorted(flatten(load(path)))
    for override in overrides:
        key = override.removeprefix("--config.").partition("=")[0].partition(" ")[0]
        if key not in known and not any(k.startswith(key + ".") for k in known):
            close = difflib.get_close_matches(key, known, 1, 0.4)
            return f"config {path} has no key {key!r}." + (f" Did you mean --config.{close[0]}=...?" if close else "")
    return f"config {path}: {error}"


def flatten(config: ConfigDict, prefix: str = "") -> dict[str, Any]:
    """`{"data.batch_size": 64, ...}`, sorted by key."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, ConfigDict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return dict(sorted(flat.items()))


def to_json(config: ConfigDict) -> str:
    return json.dumps(config.to_dict(), indent=1, sort_keys=True)


def from_json(text: str) -> ConfigDict:
    """The config that `to_json` wrote; lists become tuples again."""

    def tuples(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: tuples(v) for k, v in value.items()}
        return tuple(map(tuples, value)) if isinstance(value, list) else value

    return ConfigDict(tuples(json.loads(text))).lock()


def text_tokens(config: ConfigDict) -> int:
    """Length of one text as the alignment shows it to the report encoder: a sentence, or a whole report."""
    options = config.objectives.alignment
    return options.sentence_tokens if options.report_view == "sentences" else config.data.max_tokens


# Keys that may differ between the run that wrote a checkpoint and the one that resumes it: they change neither the
# model nor the sequence of batches nor the optimisation.
RESUME_FREE = (
    "name", "data.workers", "data.read_threads", "data.train", "data.valid", "training.log_every", "training.validate_every",
    "training.checkpoint_every", "training.keep_checkpoints", "mesh.data", "mesh.fsdp", "mesh.tensor", "model.remat",
    "model.attention",
)  # fmt: skip


def config_hash(config: ConfigDict) -> str:
    """12 hex digits over every key that matters for the result."""
    kept = {k: v for k, v in flatten(config).items() if k not in RESUME_FREE}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()[:12]


def resume_differences(old: ConfigDict, new: ConfigDict) -> list[str]:
    """`["optimizer.learning_rate: 0.001 -> 0.0001", ...]` for the keys that must not change within a run."""
    a, b = flatten(old), flatten(new)
    keys = sorted((a.keys() | b.keys()) - set(RESUME_FREE))
    return [f"{k}: {a.get(k, 'absent')} -> {b.get(k, 'absent')}" for k in keys if a.get(k) != b.get(k)]


def validate(config: ConfigDict) -> None:
    """Raises one `UserError` that lists every impossible setting and what to write instead."""
    parts = (_data_problems, _model_problems, _objective_problems, _training_problems)
    problems = [problem for part in parts for problem in part(config)]
    if problems:
        raise UserError("the configuration is impossible:\n  - " + "\n  - ".join(problems))


def _choice(key: str, value: Any, choices: tuple | list) -> list[str]:
    return [] if value in choices else [f"{key} = {value!r}: choose one of {', '.join(map(str, choices))}"]


def _positive(config: ConfigDict, *keys: str) -> list[str]:
    flat = flatten(config)
    return [f"{key} = {flat[key]}: must be at least 1" for key in keys if not flat[key] >= 1]


def _data_problems(config: ConfigDict) -> list[str]:
    data = config.data
    problems = _positive(config, "data.batch_size", "data.max_sentences", "data.vocab_size", "optimizer.accumulation")
    if data.max_tokens < 8:
        problems.append(f"data.max_tokens = {data.max_tokens}: must be at least 8")
    if data.max_tokens > config.model.report_encoder.max_positions:
        problems.append(
            f"data.max_tokens = {data.max_tokens} is more than model.report_encoder.max_positions = "
            f"{config.model.report_encoder.max_positions}: lower the first or raise the second"
        )
    if data.batch_size >= 1 and config.optimizer.accumulation >= 1 and data.batch_size % config.optimizer.accumulation:
        problems.append(
            f"data.batch_size = {data.batch_size} is not divisible by optimizer.accumulation = {config.optimizer.accumulation}"
        )
    if not 3 <= config.objectives.alignment.sentence_tokens <= config.model.report_encoder.max_positions:
        problems.append(
            f"objectives.alignment.sentence_tokens = {config.objectives.alignment.sentence_tokens}: from 3 to "
            f"model.report_encoder.max_positions = {config.model.report_encoder.max_positions}"
        )
    for window in data.windows:
        if len(window) != 2 or window[0] >= window[1]:
            problems.append(f"data.windows contains {window}: each window is (lower HU, upper HU), lower < upper")
    if not data.windows:
        problems.append("data.windows is empty: give at least one window, e.g. ((-1000.0, 1000.0),)")
    for key in ("max_patients", "workers", "read_threads"):
        if data[key] < 0:
            problems.append(f"data.{key} = {data[key]}: must not be negative")
    return problems


def _model_problems(config: ConfigDict) -> list[str]:
    model, volume = config.model, config.model.volume_encoder
    problems = [
        *_choice("model.dtype", model.dtype, DTYPES),
        *_choice("model.remat", model.remat, REMAT_POLICIES),
        *_choice("model.volume_encoder.preset", volume.preset, sorted(presets.VOLUME_PRESETS)),
        *_choice("model.volume_encoder.stem", volume.stem, ("linear", "conv")),
        *_choice("model.volume_encoder.positions", volume.positions, ("learned", "sincos")),
        *_choice("model.volume_encoder.pooling", volume.pooling, ("attention", "mean", "flatten")),
        *_choice("model.report_encoder.preset", model.report_encoder.preset, sorted(presets.REPORT_PRESETS)),
        *_choice("objectives.alignment.report_view", config.objectives.alignment.report_view, ("report", "sentences")),
        *_positive(config, "model.projection_dim", "objectives.alignment.report_sentences"),
    ]
    for size in ("volume_size",):
        if len(model[size]) != 3 or min(model[size]) < 1:
            problems.append(f"model.{size} = {model[size]}: give three positive numbers of voxels, e.g. (128, 128, 96)")
    if len(volume.patch_size) != 3 or min(volume.patch_size) < 1:
        problems.append(f"model.volume_encoder.patch_size = {volume.patch_size}: give three positive numbers")
    elif len(model.volume_size) == 3:
        for axis, size, patch in zip("XYZ", model.volume_size, volume.patch_size, strict=True):
            if size % patch:
                fit = max(patch, round(size / patch) * patch)
                problems.append(
                    f"model.volume_size {axis} = {size} is not divisible by model.volume_encoder.patch_size {axis} = {patch}: "
                    f"use a volume of {fit} or another patch"
                )
    for name in ("volume_encoder", "report_encoder"):
        table = presets.VOLUME_PRESETS if name == "volume_encoder" else presets.REPORT_PRESETS
        if model[name].preset in table:
            preset = table[model[name].preset]
            if preset.width % preset.num_heads:
                problems.append(
                    f"model.{name}.preset {model[name].preset}: {preset.num_heads} heads do not divide width {preset.width}"
                )
    return problems


def _objective_problems(config: ConfigDict) -> list[str]:
    options, decoder = config.objectives, config.model.voxel_decoder
    voxels, matching = options.volume_reconstruction, options.matching
    problems = [
        *_choice("objectives.alignment.form", options.alignment.form, ("softmax", "sigmoid")),
        *_choice("objectives.volume_reconstruction.masking", voxels.masking, ("random", "nested")),
        *_choice("objectives.matching.average", matching.average, ("pairs", "patients")),
        *_choice("objectives.matching.sentence_source", matching.sentence_source, ("encoder", "embeddings", "words")),
        *_choice("model.fusion.kind", config.model.fusion.kind, ("attention", "gate")),
        *_positive(config, "model.fusion.depth", "model.matching_dim", "model.voxel_decoder.depth"),
    ]
    flat = flatten(options, "objectives.")
    for key, value in flat.items():
        if key.endswith("weight") and value < 0:
            problems.append(f"{key} = {value}: must not be negative; 0 switches it off")
        if key.endswith(".temperature") and not value > 0:
            problems.append(f"{key} = {value}: must be positive, e.g. 0.1")
        if key.endswith(".mask_ratio") and not 0 < value < 1:
            problems.append(f"{key} = {value}: must lie between 0 and 1, both excluded")
    if not -1 <= matching.low < matching.high <= 1:
        problems.append(
            f"objectives.matching.low = {matching.low}, high = {matching.high}: cosines with low < high are needed"
        )
    if voxels.weight > 0 and decoder.width % decoder.num_heads:
        problems.append(
            f"model.voxel_decoder.num_heads = {decoder.num_heads} does not divide its width = {decoder.width}"
        )
    grid = [n // p for n, p in zip(config.model.volume_size, config.model.volume_encoder.patch_size, strict=False)]
    if voxels.weight > 0 and voxels.masking == "nested" and any(n % 2 for n in grid):
        problems.append(
            f'objectives.volume_reconstruction.masking = "nested" needs an even number of patches along each axis, not '
            f'{tuple(grid)}: use "random" or another patch'
        )
    if voxels.weight > 0 and math.prod(grid) < 2:
        problems.append(
            f"a grid of {tuple(grid)} patches has nothing to hide: use a smaller patch_size or a larger volume"
        )
    if config.optimizer.gradient_cache and config.optimizer.accumulation == 1:
        problems.append(
            "optimizer.gradient_cache does nothing with optimizer.accumulation = 1: set how many micro-batches"
        )
    return problems


def _training_problems(config: ConfigDict) -> list[str]:
    training = config.training
    problems = _choice("schedule.kind", config.schedule.kind, SCHEDULES)
    problems += _choice("optimizer.name", config.optimizer.name, ("adamw",))
    lengths = {k: training[k] for k in ("steps", "epochs", "samples") if training[k]}
    if len(lengths) != 1 or min(lengths.values()) <= 0:
        problems.append(
            f"training.steps = {training.steps}, training.epochs = {training.epochs}, training.samples = {training.samples}: "
            "set exactly one of them to a positive number"
        )
    problems += _positive(config, "training.log_every", "training.checkpoint_every", "training.keep_checkpoints")
    sizes = [config.mesh.data, config.mesh.fsdp, config.mesh.tensor]
    if sizes.count(-1) > 1 or any(s < 1 and s != -1 for s in sizes):
        problems.append(
            f"mesh (data, fsdp, tensor) = {tuple(sizes)}: positive sizes, at most one of them -1 (whatever is left)"
        )
    if not any(objective.weight > 0 for objective in config.objectives.values()):
        problems.append("no objective has a positive weight: set e.g. objectives.alignment.weight=1.0")
    return problems

"""What is impossible in a configuration, said before anything is built: a mistake costs seconds and not a queue slot."""

from __future__ import annotations

import math
from typing import Any

from ml_collections import ConfigDict

from mg3d_jax import config as config_lib
from mg3d_jax import presets, sharding
from mg3d_jax.errors import UserError

DTYPES = ("float32", "bfloat16")
REMAT_POLICIES = ("none", "minimal", "full", "offload")
SCHEDULES = ("linear", "cosine", "constant")
OPTIMIZERS = ("adamw", "muon")
LENGTH_UNITS = ("steps", "epochs", "samples")
WRITERS = ("jsonl", "tensorboard", "wandb")


def validate(config: ConfigDict) -> None:
    """Raises one `UserError` that lists every impossible setting and what to write instead."""
    if wrong := config_lib.wrong_keys(config):  # what is checked below reads all of them
        raise UserError("the configuration is impossible:\n  - " + "\n  - ".join(wrong))
    parts = (_data_problems, _model_problems, _objective_problems, _training_problems)
    problems = [problem for part in parts for problem in part(config)]
    if problems:
        raise UserError("the configuration is impossible:\n  - " + "\n  - ".join(problems))


def _choice(key: str, value: Any, choices: tuple | list) -> list[str]:
    return [] if value in choices else [f"{key} = {value!r}: choose one of {', '.join(map(str, choices))}"]


def _positive(config: ConfigDict, *keys: str) -> list[str]:
    flat = config_lib.flatten(config)
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
    if data.weights and (len(data.weights) != len(data.train) or min(data.weights) <= 0):
        problems.append(
            f"data.weights = {tuple(data.weights)}: give one positive share for each of the {len(data.train)} folders of "
            "data.train"
        )
    for key in ("max_patients", "workers", "read_threads", "max_bad_records"):
        if data[key] < 0:
            problems.append(f"data.{key} = {data[key]}: must not be negative")
    return problems


def _model_problems(config: ConfigDict) -> list[str]:
    model, report = config.model, config.model.report_encoder
    problems = [
        *_choice("model.dtype", model.dtype, DTYPES),
        *_choice("model.remat", model.remat, REMAT_POLICIES),
        *_choice("model.report_encoder.preset", report.preset, sorted(presets.REPORT_PRESETS)),
        *_choice("objectives.alignment.report_view", config.objectives.alignment.report_view, ("report", "sentences")),
        *_positive(config, "model.projection_dim", "objectives.alignment.report_sentences"),
    ]
    if len(model.volume_size) != 3 or min(model.volume_size) < 1:
        return [
            *problems,
            f"model.volume_size = {model.volume_size}: give three positive numbers of voxels, e.g. (128, 128, 96)",
        ]
    problems += _volume_encoder_problems(config)
    for name, table in (("volume_encoder", _volume_presets(model)), ("report_encoder", presets.REPORT_PRESETS)):
        preset, frozen = table.get(model[name].preset), model[name].frozen_layers
        if preset is not None and preset.width % preset.num_heads:
            problems.append(
                f"model.{name}.preset {model[name].preset}: {preset.num_heads} heads do not divide width {preset.width}"
            )
        if preset is not None and not -1 <= frozen <= preset.depth:
            problems.append(
                f"model.{name}.frozen_layers = {frozen}: from 0 (none) to {preset.depth}, the layers of preset "
                f"{model[name].preset}, or -1 for the whole encoder"
            )
    return problems


# Keys of `model.volume_encoder` that only the one kind reads.
VIT_KEYS = ("patch_size", "stem", "positions", "num_registers", "qk_norm", "layer_scale", "norm_epsilon", "exact_gelu")
SWIN_KEYS = ("merging",)


def _volume_presets(model: ConfigDict) -> dict[str, Any]:
    return presets.SWIN_PRESETS if model.volume_encoder.kind == "swin" else presets.VOLUME_PRESETS


def _volume_encoder_problems(config: ConfigDict) -> list[str]:
    """The volume size is known to be three positive numbers."""
    model, volume = config.model, config.model.volume_encoder
    swin = volume.kind == "swin"
    problems = [
        *_choice("model.volume_encoder.kind", volume.kind, ("vit", "swin")),
        *_choice("model.volume_encoder.preset", volume.preset, sorted(_volume_presets(model))),
        *_choice("model.volume_encoder.stem", volume.stem, ("linear", "conv")),
        *_choice("model.volume_encoder.positions", volume.positions, ("learned", "sincos")),
        *_choice(
            "model.volume_encoder.pooling", volume.pooling, ("attention", "mean", *(() if swin else ("flatten",)))
        ),
        *_choice("model.volume_encoder.merging", volume.merging, ("merging", "mergingv2")),
    ]
    fresh = config_lib.default().model.volume_encoder
    for key in VIT_KEYS if swin else SWIN_KEYS:
        if volume[key] != fresh[key]:
            problems.append(
                f"model.volume_encoder.{key} = {volume[key]!r} means nothing with kind = {volume.kind!r}: leave it at "
                f"{fresh[key]!r}"
            )
    if len(volume.patch_size) != 3 or min(volume.patch_size) < 1:
        return [*problems, f"model.volume_encoder.patch_size = {volume.patch_size}: give three positive numbers"]
    if volume.preset not in _volume_presets(model):
        return problems
    what = f"the {volume.preset} cell" if swin else "model.volume_encoder.patch_size"
    other = "" if swin else " or another patch"
    for axis, size, cell in zip("XYZ", model.volume_size, presets.token_cell(model), strict=True):
        if size % cell:
            fit = max(cell, round(size / cell) * cell)
            problems.append(
                f"model.volume_size {axis} = {size} is not divisible by {what} {axis} = {cell}: use a volume of {fit}{other}"
            )
    return problems


def _grid(model: ConfigDict) -> tuple[int, ...]:
    """Tokens along each axis; even ones where that is another problem's business."""
    try:
        return presets.token_grid(model)
    except (UserError, ValueError, ZeroDivisionError):
        return (2, 2, 2)


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
    flat = config_lib.flatten(options, "objectives.")
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
    grid = _grid(config.model)
    if voxels.weight > 0 and voxels.masking == "nested" and any(n % 2 for n in grid):
        problems.append(
            f'objectives.volume_reconstruction.masking = "nested" needs an even number of patches along each axis, not '
            f'{grid}: use "random" or another patch'
        )
    if voxels.weight > 0 and math.prod(grid) < 2:
        problems.append(f"a grid of {grid} patches has nothing to hide: use a smaller patch_size or a larger volume")
    if config.optimizer.gradient_cache and config.optimizer.accumulation == 1:
        problems.append(
            "optimizer.gradient_cache does nothing with optimizer.accumulation = 1: set how many micro-batches"
        )
    return problems


def _training_problems(config: ConfigDict) -> list[str]:
    training = config.training
    problems = _choice("schedule.kind", config.schedule.kind, SCHEDULES)
    problems += _choice("optimizer.name", config.optimizer.name, OPTIMIZERS)
    problems += _choice("training.best_mode", training.best_mode, ("min", "max"))
    for writer in training.writers:
        problems += _choice("training.writers", writer, WRITERS)
    problems += _schedule_problems(config.schedule)
    if not 0 <= config.optimizer.ema < 1:
        problems.append(f"optimizer.ema = {config.optimizer.ema}: a decay from 0 (none) to below 1, e.g. 0.999")
    for key in ("validate_every", "evaluate_every", "watchdog_minutes"):
        if training[key] < 0:
            problems.append(f"training.{key} = {training[key]}: must not be negative; 0 switches it off")
    split = training.best_metric.partition("/")[0]
    if training.best_metric and split not in ("valid", "evaluation"):
        problems.append(
            f"training.best_metric = {training.best_metric!r}: a name like valid/loss or evaluation/auroc_macro"
        )
    for best, words in (("max", ("auroc", "recall@", "accuracy")), ("min", ("loss", "median_rank"))):
        if training.best_mode != best and any(word in training.best_metric for word in words):
            problems.append(
                f"training.best_metric = {training.best_metric!r} with training.best_mode = {training.best_mode!r} would keep "
                f"the worst: set training.best_mode = {best!r}"
            )
    if split == "valid" and not training.validate_every:
        problems.append(
            f"training.best_metric = {training.best_metric!r} is measured only at the end: set training.validate_every"
        )
    if split == "evaluation" and not training.evaluate_every:
        problems.append(
            f"training.best_metric = {training.best_metric!r} is never measured: set training.evaluate_every"
        )
    if (training.evaluate_every or training.best_metric) and not config.data.valid:
        problems.append(
            "training.evaluate_every and training.best_metric need held-out data: set data.valid to a prepared folder"
        )
    lengths = {k: training[k] for k in ("steps", "epochs", "samples") if training[k]}
    if len(lengths) != 1 or min(lengths.values()) <= 0:
        problems.append(
            f"training.steps = {training.steps}, training.epochs = {training.epochs}, training.samples = {training.samples}: "
            "set exactly one of them to a positive number"
        )
    problems += _positive(config, "training.log_every", "training.checkpoint_every", "training.keep_checkpoints")
    problems += _positive(config, "training.max_skipped", "mesh.slices")
    try:
        sharding.requested_sizes(config.mesh)
    except UserError as error:
        problems.append(str(error))
    if not 0 <= config.mesh.max_replicated <= 1:
        problems.append(f"mesh.max_replicated = {config.mesh.max_replicated}: a share from 0 to 1, e.g. 0.1")
    if not any(objective.weight > 0 for objective in config.objectives.values()):
        problems.append("no objective has a positive weight: set e.g. objectives.alignment.weight=1.0")
    return problems


def _schedule_problems(schedule: ConfigDict) -> list[str]:
    problems = []
    for part in ("warmup", "cooldown"):
        given = [f"{part}_{unit}" for unit in LENGTH_UNITS if schedule[f"{part}_{unit}"]]
        if len(given) > 1:
            problems.append(f"schedule.{' and schedule.'.join(given)} are both set: give one of them")
        if part == "cooldown" and given and schedule.kind != "constant":
            problems.append(f'schedule.{given[0]} does nothing with schedule.kind = "{schedule.kind}": use "constant"')
        for key in (f"{part}_{unit}" for unit in (*LENGTH_UNITS, "percent")):
            if schedule[key] < 0:
                problems.append(f"schedule.{key} = {schedule[key]}: must not be negative")
        if schedule[f"{part}_percent"] > 100:
            problems.append(f"schedule.{part}_percent = {schedule[f'{part}_percent']}: at most 100")
    return problems

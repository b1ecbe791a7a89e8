"""What is impossible in a configuration, said before anything is built: a mistake costs seconds and not a queue slot."""

from __future__ import annotations

from dataclasses import fields
from math import inf

from mg3d_jax import sharding
from mg3d_jax.config.parts import DECLARED, Config, EncoderConfig, ModelConfig, ScheduleConfig
from mg3d_jax.errors import UserError
from mg3d_jax.options import choice, flatten, to_dict

DTYPES = ("float32", "bfloat16")
REMAT_POLICIES = ("none", "minimal", "full", "offload")
SCHEDULES = ("linear", "cosine", "constant")
OPTIMIZERS = ("adamw", "muon")
BALANCES = ("fixed", "uncertainty")
LENGTH_UNITS = ("steps", "epochs", "samples")
REPORT_INPUTS = ("tokens", "sentences")
WRITERS = ("jsonl", "tensorboard", "wandb")


def validate(config: Config) -> None:
    """Raises one `UserError` that lists every impossible setting and what to write instead."""
    parts = (_data_problems, _model_problems, _objective_problems, _training_problems)
    problems = [problem for part in parts for problem in part(config)]
    if problems:
        raise UserError("the configuration is impossible:\n  - " + "\n  - ".join(problems))


def _positive(config: Config, *keys: str) -> list[str]:
    flat = flatten(to_dict(config))
    return [f"{key} = {flat[key]}: must be at least 1" for key in keys if not flat[key] >= 1]


def _data_problems(config: Config) -> list[str]:
    data, longest = config.data, config.model.report_encoder.max_positions
    problems = _positive(config, "data.batch_size", "data.max_sentences", "data.vocab_size", "optimizer.accumulation")
    if data.max_tokens < 8:
        problems.append(f"data.max_tokens = {data.max_tokens}: must be at least 8")
    if data.max_tokens > longest:
        problems.append(
            f"data.max_tokens = {data.max_tokens} is more than model.report_encoder.max_positions = {longest}: lower the "
            "first or raise the second"
        )
    pieces = config.optimizer.accumulation
    if data.batch_size >= 1 and pieces >= 1 and data.batch_size % pieces:
        problems.append(f"data.batch_size = {data.batch_size} is not divisible by optimizer.accumulation = {pieces}")
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
    if not 0 <= data.patients_percent <= 100 or (data.patients_percent and data.max_patients):
        problems.append(
            f"data.patients_percent = {data.patients_percent}: from 0 (all) to 100, and not together with data.max_patients"
        )
    if data.grid:
        problems += _grid_problems(config)
    for key in ("max_patients", "subset_seed", "workers", "read_threads", "max_bad_records"):
        if getattr(data, key) < 0:
            problems.append(f"data.{key} = {getattr(data, key)}: must not be negative")
    return problems


def _grid_problems(config: Config) -> list[str]:
    grid = config.data.grid
    if len(grid) != 3 or min(grid) < 1:
        return [f"data.grid = {grid}: give three positive numbers of voxels, or () for model.volume_size"]
    read_whole = [
        f"{group}.{name}"
        for group in ("objectives", "tasks")
        for name, options in getattr(config, group).items()
        if options.weight > 0 and not DECLARED[group][name].reads(options)
    ]
    if grid == tuple(config.model.volume_size) or not read_whole:
        return []
    return [
        f"data.grid = {grid} is not model.volume_size = {tuple(config.model.volume_size)}, and {', '.join(read_whole)} read "
        "whole volumes: only tasks.segmentation draws crops"
    ]


def _model_problems(config: Config) -> list[str]:
    model = config.model
    problems = [
        *choice("model.dtype", model.dtype, DTYPES),
        *choice("model.remat", model.remat, REMAT_POLICIES),
        *choice("model.fusion.kind", model.fusion.kind, ("attention", "gate")),
        *choice("model.report_input", model.report_input, REPORT_INPUTS),
        *_positive(
            config, "model.projection_dim", "model.fusion.depth", "model.matching_dim", "model.voxel_decoder.depth"
        ),
    ]
    if len(model.volume_size) != 3 or min(model.volume_size) < 1:
        return [
            *problems,
            f"model.volume_size = {model.volume_size}: give three positive numbers of voxels, e.g. (128, 128, 96)",
        ]
    for name, encoder in (("volume_encoder", model.volume_encoder), ("report_encoder", model.report_encoder)):
        problems += _encoder_problems(f"model.{name}", encoder, model)
    problems += choice(
        "model.volume_encoder.pooling", model.volume_encoder.pooling, model.volume_encoder.tower.poolings
    )
    report = model.report_encoder
    if report.precompute and report.frozen_layers != -1:
        problems.append(
            f"model.report_encoder.precompute: the features of a tower that is trained change (frozen_layers = "
            f"{report.frozen_layers}): set model.report_encoder.frozen_layers=-1, or precompute=False"
        )
    if model.report_input == "sentences" and not report.precompute:
        problems.append(
            'model.report_input = "sentences" reads features that were computed once: set model.report_encoder.precompute=True'
        )
    return problems + _cell_problems(model)


def _encoder_problems(name: str, encoder: EncoderConfig, model: ModelConfig) -> list[str]:
    tower = encoder.tower
    problems = choice(f"{name}.preset", encoder.preset, sorted(tower.presets)) + tower.problems(encoder, model)
    preset, frozen = tower.presets.get(encoder.preset), encoder.frozen_layers
    if preset is not None and preset.width % preset.num_heads:
        problems.append(f"{name}.preset {encoder.preset}: {preset.num_heads} heads do not divide width {preset.width}")
    if preset is not None and not -1 <= frozen <= preset.depth:
        problems.append(
            f"{name}.frozen_layers = {frozen}: from 0 (none) to {preset.depth}, the layers of preset {encoder.preset}, or "
            "-1 for the whole encoder"
        )
    return problems


def _cell_problems(model: ModelConfig) -> list[str]:
    """Cells that do not fill the volume. The volume size is known to be three positive numbers."""
    encoder = model.volume_encoder
    cells = _cell(model)
    if cells is None:
        return []
    by_patch = any(field.name == "patch_size" for field in fields(encoder.options))
    what = "model.volume_encoder.patch_size" if by_patch else f"the {encoder.preset} cell"
    other = " or another patch" if by_patch else ""
    problems = []
    for axis, size, cell in zip("XYZ", model.volume_size, cells, strict=True):
        if size % cell:
            fit = max(cell, round(size / cell) * cell)
            problems.append(
                f"model.volume_size {axis} = {size} is not divisible by {what} {axis} = {cell}: use a volume of {fit}{other}"
            )
    return problems


def _cell(model: ModelConfig) -> tuple[int, ...] | None:
    """Voxels per token; None where that is another problem's business."""
    try:
        cell = model.token_cell()
    except (KeyError, ValueError):
        return None
    return cell if min(cell) >= 1 else None


def _objective_problems(config: Config) -> list[str]:
    problems = []
    for group, registry in DECLARED.items():
        for name, options in getattr(config, group).items():
            problems += registry[name].problems(options, config)
            for key, value in flatten(to_dict(options), f"{group}.{name}.").items():
                if key.endswith("weight") and value < 0:
                    problems.append(f"{key} = {value}: must not be negative; 0 switches it off")
                if key.endswith(".temperature") and not value > 0:
                    problems.append(f"{key} = {value}: must be positive, e.g. 0.1")
                if key.endswith(".mask_ratio") and not 0 < value < 1:
                    problems.append(f"{key} = {value}: must lie between 0 and 1, both excluded")
    if config.optimizer.gradient_cache and config.optimizer.accumulation == 1:
        problems.append(
            "optimizer.gradient_cache does nothing with optimizer.accumulation = 1: set how many micro-batches"
        )
    return problems


# Keys, and the smallest and largest value that each may have; "below" excludes the largest.
RANGES: tuple[tuple[str, float, float, str], ...] = (
    ("optimizer.learning_rate", 0, inf, ""),
    ("optimizer.b1", 0, 1, "below"),
    ("optimizer.b2", 0, 1, "below"),
    ("optimizer.weight_decay", 0, inf, ""),
    ("optimizer.clip_norm", 0, inf, ""),
    ("schedule.final_fraction", 0, 1, ""),
    ("model.volume_encoder.dropout", 0, 1, "below"),
    ("model.report_encoder.dropout", 0, 1, "below"),
    ("data.augment.shift", 0, inf, ""),
    ("data.augment.scale", 0, 1, "below"),
    ("data.augment.offset", 0, inf, ""),
    ("data.augment.noise", 0, inf, ""),
)


def _range_problems(config: Config) -> list[str]:
    """Numbers that mean nothing, NaN among them."""
    flat, problems = flatten(to_dict(config)), []
    for key, low, high, open_end in RANGES:
        value = flat[key]
        if low <= value < inf and (value < high or (value == high and not open_end)):
            continue
        most = "finite" if high == inf else f"below {high}" if open_end else f"at most {high}"
        problems.append(f"{key} = {value}: must be at least {low} and {most}")
    for pattern, factor in config.optimizer.learning_rate_multipliers:
        if not 0 <= factor < inf:
            problems.append(
                f"optimizer.learning_rate_multipliers: {factor} for {pattern!r}: must be at least 0 and finite"
            )
    return problems


def _training_problems(config: Config) -> list[str]:
    training = config.training
    problems = _range_problems(config) + choice("schedule.kind", config.schedule.kind, SCHEDULES)
    problems += choice("optimizer.name", config.optimizer.name, OPTIMIZERS)
    problems += choice("optimizer.balance", config.optimizer.balance, BALANCES)
    problems += choice("training.best_mode", training.best_mode, ("min", "max"))
    for writer in training.writers:
        problems += choice("training.writers", writer, WRITERS)
    problems += _schedule_problems(config.schedule)
    if not 0 <= config.optimizer.ema < 1:
        problems.append(f"optimizer.ema = {config.optimizer.ema}: a decay from 0 (none) to below 1, e.g. 0.999")
    if not 0 < config.optimizer.layer_decay <= 1:
        problems.append(
            f"optimizer.layer_decay = {config.optimizer.layer_decay}: above 0 and at most 1 (no decay), e.g. 0.75"
        )
    for key in ("validate_every", "evaluate_every", "watchdog_minutes"):
        if getattr(training, key) < 0:
            problems.append(f"training.{key} = {getattr(training, key)}: must not be negative; 0 switches it off")
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
    measured = training.evaluate_every or any(options.every > 0 for options in config.evaluations.values())
    for name, options in config.evaluations.items():
        if options.every < -1:
            problems.append(f"evaluations.{name}.every = {options.every}: -1 (never), 0 or a number of steps")
    if split == "evaluation" and not measured:
        problems.append(
            f"training.best_metric = {training.best_metric!r} is never measured: set training.evaluate_every"
        )
    if (measured or training.best_metric) and not config.data.valid:
        problems.append(
            "evaluations during training and training.best_metric need held-out data: set data.valid to a prepared folder"
        )
    lengths = {k: getattr(training, k) for k in LENGTH_UNITS if getattr(training, k)}
    if len(lengths) != 1 or min(lengths.values()) <= 0:
        problems.append(
            f"training.steps = {training.steps}, training.epochs = {training.epochs}, training.samples = {training.samples}: "
            "set exactly one of them to a positive number"
        )
    if config.init_from.whole and not config.init_from.path:
        problems.append("init_from.whole = True: give the run in init_from.path, e.g. RUN@STEP")
    if min(training.keep_steps, default=1) < 1:
        problems.append(f"training.keep_steps = {training.keep_steps}: steps are counted from 1")
    problems += _positive(config, "training.log_every", "training.checkpoint_every", "training.keep_checkpoints")
    problems += _positive(config, "training.max_skipped", "mesh.slices")
    try:
        sharding.requested_sizes(config.mesh)
    except UserError as error:
        problems.append(str(error))
    if not 0 <= config.mesh.max_replicated <= 1:
        problems.append(f"mesh.max_replicated = {config.mesh.max_replicated}: a share from 0 to 1, e.g. 0.1")
    groups = (*config.objectives.values(), *config.tasks.values())
    if not any(options.weight > 0 for options in groups):
        problems.append("no objective has a positive weight: set e.g. objectives.alignment.weight=1.0")
    return problems


def _schedule_problems(schedule: ScheduleConfig) -> list[str]:
    problems = []
    for part in ("warmup", "cooldown"):
        given = [f"{part}_{unit}" for unit in LENGTH_UNITS if getattr(schedule, f"{part}_{unit}")]
        if len(given) > 1:
            problems.append(f"schedule.{' and schedule.'.join(given)} are both set: give one of them")
        if part == "cooldown" and given and schedule.kind != "constant":
            problems.append(f'schedule.{given[0]} does nothing with schedule.kind = "{schedule.kind}": use "constant"')
        for key in (f"{part}_{unit}" for unit in (*LENGTH_UNITS, "percent")):
            if (value := getattr(schedule, key)) < 0:
                problems.append(f"schedule.{key} = {value}: must not be negative")
        if (percent := getattr(schedule, f"{part}_percent")) > 100:
            problems.append(f"schedule.{part}_percent = {percent}: at most 100")
    return problems

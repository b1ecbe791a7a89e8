"""The parts of a configuration as frozen dataclasses: every key that there is, its default, and what it means.

Config files see the same tree as an `ml_collections.ConfigDict` (`config.default()`); after `config.load` it is these
dataclasses, and each function takes only the part that it needs. The keys of objectives, tasks, evaluations and towers
(encoders) are declared in their own files and found in their registries.

`key(default, meaning)` declares a key; `key(None, "", factory=...)` nests further ones, and has no default or meaning of its
own. Flags of a key (`options.key`): `resume_free`, it may differ between a run and its resume; `neutral`, what an older run
that lacks the key gets. The meanings make the table of `docs/configuration.md`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

from mg3d_jax import options as options_lib
from mg3d_jax.errors import UserError
from mg3d_jax.options import Group, checked_options, key
from mg3d_jax.registry import EVALUATIONS, OBJECTIVES, REPORT_TOWERS, TASKS, VOLUME_TOWERS, Registry
from mg3d_jax.sharding import MeshConfig

Range = tuple[float, float]  # (low, high)


@dataclass(frozen=True)
class AugmentConfig:
    """Random changes of the training volumes, drawn on the device. Never a flip: reports name sides."""

    shift: int = key(0, "largest shift along each axis, in voxels; air fills the border")
    scale: float = key(0.0, "largest relative change of the intensity above air")
    offset: float = key(0.0, "largest offset, in HU")
    noise: float = key(0.0, "standard deviation of the noise, in HU")


@dataclass(frozen=True)
class DataConfig:
    """What is trained on, and how it becomes batches."""

    train: tuple[str, ...] = key((), "folders made by `mg3d prepare`", resume_free=True)
    valid: tuple[str, ...] = key((), "held-out folders for the loss during training; may stay empty", resume_free=True)
    grid: tuple[int, ...] = key(
        (),
        "voxels x, y, z of the prepared volumes where tasks.segmentation draws crops of model.volume_size from them; empty: "
        "the same",
        neutral=(),
    )
    batch_size: int = key(64, "patients per step, all devices of all processes together")
    max_patients: int = key(0, "train on the first K patients only (nested subsets); 0: all")
    subset_seed: int = key(
        0, "which patients max_patients and patients_percent take: the first (0), or a draw of this seed (nested, too)",
        neutral=0,
    )  # fmt: skip
    patients_percent: float = key(
        0.0, "train on the first so many percent of the patients of each folder (nested subsets), at least one; 0: all",
        neutral=0.0,
    )  # fmt: skip
    tokenizer: str = key(
        "train", '"train": a WordPiece tokenizer of the training reports; else a Hugging Face name or folder'
    )
    vocab_size: int = key(4096, 'tokens in the vocabulary of tokenizer "train"')
    max_tokens: int = key(250, "tokens of a report; what does not fit is cut")
    max_sentences: int = key(32, "sentences of a report; later ones are cut")
    windows: tuple[Range, ...] = key(
        ((-1000.0, 1000.0),), "HU windows, one channel each, scaled to [0, 1] on the device"
    )
    shuffle_reports: bool = key(False, "control experiment: pairs every volume with another patient's report")
    weights: tuple[float, ...] = key(
        (), "share of each folder of `train` among the samples, e.g. (3, 1); empty: in proportion to its records"
    )
    max_bad_records: int = key(
        100,
        "damaged records (by checksum) are skipped and listed; the run ends when there are more than this",
        resume_free=True,
    )
    workers: int = key(0, "grain worker processes per host; 0 reads in the main process", resume_free=True)
    read_threads: int = key(4, "threads that read and decode ahead", resume_free=True)
    stall_minutes: float = key(
        60.0,
        "a batch that does not come for so long ends the run, saved and with exit code 75; 0: never",
        neutral=0.0,
        resume_free=True,
    )
    augment: AugmentConfig = key(None, "", factory=AugmentConfig)

    def subset(self) -> dict[str, Any]:
        """Which patients of `train` are trained on, as `PreparedData` is told."""
        return {"max_patients": self.max_patients, "percent": self.patients_percent, "subset_seed": self.subset_seed}


@dataclass(frozen=True)
class EncoderConfig:
    """What both encoders have in common. The subclasses declare the fields again, with their own defaults and meanings.

    `options` is the dataclass that the tower of this `kind` declares for itself (`models/towers`); config files have its
    fields flat, beside the common ones.
    """

    kind: str = ""
    preset: str = ""
    dropout: float = 0.0
    pretrained: str = ""
    frozen_layers: int = 0
    options: Any = None

    def __post_init__(self) -> None:
        if self.options is None:
            object.__setattr__(self, "options", options_of(self.tower)())

    def to_dict(self) -> dict[str, Any]:
        """Flat, as in config files: common keys, the options of this kind, and those of all other kinds at their defaults."""
        own = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "options"}
        return tower_defaults(self.towers()) | own | options_lib.to_dict(self.options)

    @staticmethod
    def towers() -> Registry[Any]:
        """The registry of the kinds that this encoder can be."""
        raise NotImplementedError

    @property
    def tower(self) -> Any:
        """The declared tower of this kind."""
        return self.towers()[self.kind]

    @property
    def sizes(self) -> Any:
        """Sizes of the chosen preset: at least `width`, `depth`, `num_heads`. `UserError` for a preset that the kind lacks."""
        presets = self.tower.presets
        if self.preset not in presets:
            raise UserError(f"{self.kind} preset {self.preset!r} is unknown; choose one of {', '.join(presets)}.")
        return presets[self.preset]


@dataclass(frozen=True)
class VolumeEncoderConfig(EncoderConfig):
    """The tower of the volumes."""

    kind: str = key(
        "vit", "kind of tower: vit, swin (MONAI's SwinUNETR encoder, the paper's backbone), or one of a plug-in"
    )
    preset: str = key("b", "named size of that kind (docs/towers.md)")
    pooling: str = key("attention", '"attention", "mean", or "flatten": a linear layer over all tokens, as in CT-CLIP')
    dropout: float = key(0.0, "dropout in the tower")
    pretrained: str = key("", "a folder written by `mg3d import`")
    frozen_layers: int = key(0, "k: the embedding and the first k layers are frozen; 0: nothing; -1: the whole tower")

    @staticmethod
    def towers() -> Registry[Any]:
        return VOLUME_TOWERS


@dataclass(frozen=True)
class ReportEncoderConfig(EncoderConfig):
    """The tower of the reports."""

    kind: str = key("bert", "kind of tower: bert (also RoBERTa), or one of a plug-in", neutral="bert")
    preset: str = key("base", "named size of that kind (docs/towers.md)")
    max_positions: int = key(512, "longest text, in tokens")
    dropout: float = key(0.0, "dropout in the tower")
    pretrained: str = key(
        "", "a BERT-type checkpoint: a folder or a name on the Hugging Face hub; set data.tokenizer to it, too"
    )
    frozen_layers: int = key(0, "k: the embedding and the first k layers are frozen; 0: nothing; -1: the whole tower")
    precompute: bool = key(
        False,
        "encode every single sentence once, before training, and train on the features; for a tower that is wholly frozen",
        neutral=False,
    )
    features: str = key(
        "",
        'folder in which the runs that share it keep the features of precompute, each for the next; "": in the run\'s own',
        neutral="",
        resume_free=True,
    )

    @staticmethod
    def towers() -> Registry[Any]:
        return REPORT_TOWERS


@dataclass(frozen=True)
class FusionConfig:
    """Cross-modal layers."""

    depth: int = key(2, "number of layers")
    kind: str = key("attention", '"attention", or "gate": the relevance gate of MG-3D\'s release')
    other_volumes: int = key(
        3, 'volumes of other patients that a report meets, for the form "same_words" of objectives', neutral=3
    )


@dataclass(frozen=True)
class VoxelDecoderConfig:
    """The decoder of masked volume modelling."""

    width: int = key(384, "width of its tokens")
    depth: int = key(2, "number of layers")
    num_heads: int = key(6, "attention heads; they divide the width")


@dataclass(frozen=True)
class SegmentationDecoderConfig:
    """The decoder of `tasks.segmentation`: UNETR's on a ViT, SwinUNETR's on a Swin."""

    width: int = key(
        0,
        "channels at full resolution; each level above doubles them; 0: as published, 16 on a ViT and the width of the "
        "first stage on a Swin",
        neutral=0,
    )


@dataclass(frozen=True)
class ReportDecoderConfig:
    """The decoder that writes reports (tasks.generation)."""

    width: int = key(512, "width of its tokens", neutral=512)
    depth: int = key(6, "number of layers", neutral=6)
    num_heads: int = key(8, "attention heads; they divide the width", neutral=8)


@dataclass(frozen=True)
class ModelConfig:
    """Towers, heads, and how they are computed."""

    volume_size: tuple[int, int, int] = key(
        (128, 128, 96), "voxels x, y, z of a volume; must be that of the prepared data"
    )
    volume_encoder: VolumeEncoderConfig = key(None, "", factory=VolumeEncoderConfig)
    report_encoder: ReportEncoderConfig = key(None, "", factory=ReportEncoderConfig)
    projection_dim: int = key(512, "length of the embeddings in which volume and report are compared")
    fusion: FusionConfig = key(None, "", factory=FusionConfig)
    voxel_decoder: VoxelDecoderConfig = key(None, "", factory=VoxelDecoderConfig)
    segmentation_decoder: SegmentationDecoderConfig = key(None, "", factory=SegmentationDecoderConfig, neutral=None)
    report_decoder: ReportDecoderConfig = key(None, "", factory=ReportDecoderConfig, neutral=None)
    matching_dim: int = key(
        128, "width of the sentence-conditioned and fused volume features, and of projected sentences"
    )
    report_input: str = key(
        "tokens",
        'what the objectives that read a whole report are given: the "tokens" of it, encoded together in every step; '
        '"sentences": the features of its single sentences, one a sentence, which report_encoder.precompute has encoded once',
        neutral="tokens",
    )
    dtype: str = key("bfloat16", "of activations: bfloat16 or float32; parameters and losses are float32")
    remat: str = key(
        "minimal",
        "what the backward pass computes again: none; minimal: attention, norms and GELU; full: whole layers; offload: as "
        "minimal, with what is kept in host memory",
        resume_free=True,
    )
    attention: str = key(
        "auto", "backend of the attention (`models/attention.py`); auto chooses by device", resume_free=True
    )

    def encoders(self) -> dict[str, EncoderConfig]:
        """Both, by the names that they have here and in the parameters."""
        return {"volume_encoder": self.volume_encoder, "report_encoder": self.report_encoder}

    def token_cell(self) -> tuple[int, int, int]:
        """Voxels that one volume token stands for, along each axis. Masked volume modelling hides such cells, and its
        decoder predicts their voxels."""
        return self.volume_encoder.tower.token_cell(self.volume_encoder)

    def token_grid(self) -> tuple[int, int, int]:
        """Volume tokens along each axis. `checks` has seen to it that the cells fill the volume."""
        x, y, z = (size // side for size, side in zip(self.volume_size, self.token_cell(), strict=True))
        return x, y, z


@dataclass(frozen=True)
class OptimizerConfig:
    """The optimizer, and which parameters get what learning rate and decay."""

    name: str = key("adamw", "adamw, or muon for matrices with AdamW for the rest")
    learning_rate: float = key(1e-4, "peak of the schedule")
    b1: float = key(0.9, "decay of Adam's first moment")
    b2: float = key(0.98, "decay of Adam's second moment")
    weight_decay: float = key(0.05, "decoupled weight decay")
    balance: str = key(
        "fixed",
        "fixed: objectives count by their weights; uncertainty: by their weights over their loss at each step, so that none "
        "counts for more by its scale",
        neutral="fixed",
    )
    clip_norm: float = key(1.0, "largest norm of the gradient; 0: no clipping")
    accumulation: int = key(1, "micro-batches that a batch is split into, one after another")
    gradient_cache: bool = key(
        False, "with accumulation > 1: the exact gradient of the whole batch, for one more forward pass"
    )
    learning_rate_multipliers: tuple[tuple[Any, ...], ...] = key(
        ((".*", 1.0),), "(regex, factor): the first match counts, every parameter must match"
    )
    layer_decay: float = key(
        1.0,
        "learning rate of a layer over that of the next one, in both towers; what comes before the layers counts as one "
        "more; 1: the same everywhere",
        neutral=1.0,
    )
    no_weight_decay: tuple[str, ...] = key(
        (".*(bias|scale|position|embedding|pool/query|logit_scale|logit_bias).*",),
        "regexes of parameters without decay",
    )
    freeze: tuple[str, ...] = key((), "regexes of parameters that are not trained")
    ema: float = key(0.0, "decay of the moving average of the parameters, e.g. 0.999; 0 keeps none")


@dataclass(frozen=True)
class ScheduleConfig:
    """The learning rate over the run. Warm-up and cooldown have a key for each unit of length; the first that is not 0
    counts, in the order steps, epochs, samples, percent."""

    kind: str = key("linear", '"linear" or "cosine" decay, or "constant" with a cooldown')
    warmup_steps: int = key(0, "length of the warm-up, in steps")
    warmup_epochs: float = key(0.0, "the same in epochs")
    warmup_samples: int = key(0, "the same in samples")
    warmup_percent: float = key(5.0, "the same in percent of the run")
    cooldown_steps: int = key(0, 'length of the cooldown of "constant", in steps')
    cooldown_epochs: float = key(0.0, "the same in epochs")
    cooldown_samples: int = key(0, "the same in samples")
    cooldown_percent: float = key(20.0, "the same in percent of the run")
    final_fraction: float = key(0.0, "learning rate at the end, as a share of the peak")


@dataclass(frozen=True)
class TrainingConfig:
    """How long a run is, and what it does beside its steps."""

    steps: int = key(0, "length in steps; exactly one of steps, epochs, samples is set")
    epochs: float = key(0.0, "length in epochs")
    samples: int = key(0, "length in samples")
    log_every: int = key(10, "steps between logged metrics", resume_free=True)
    validate_every: int = key(0, "steps between held-out losses; 0: only at the end", resume_free=True)
    evaluate_every: int = key(0, "steps between evaluations of data.valid; 0: never", resume_free=True)
    checkpoint_every: int = key(100, "steps between checkpoints", resume_free=True)
    keep_checkpoints: int = key(2, "how many of the newest are kept", resume_free=True)
    keep_steps: tuple[int, ...] = key(
        (),
        "steps that are saved and stay, whatever keep_checkpoints says: other runs go on from them",
        neutral=(),
        resume_free=True,
    )
    best_metric: str = key(
        "",
        'the checkpoint with the best value of this metric is kept, too: "valid/loss", "evaluation/auroc_macro", ...',
        resume_free=True,
    )
    best_mode: str = key(
        "min", "is the best value of best_metric the smallest (min) or largest (max)?", resume_free=True
    )
    max_skipped: int = key(
        10, "updates with a non-finite loss or gradient are skipped; this many in a row end the run", resume_free=True
    )
    watchdog_minutes: float = key(
        30.0, "a step that takes longer is reported with the stacks of every process; 0: never", resume_free=True
    )
    writers: tuple[str, ...] = key(
        ("jsonl", "tensorboard"), "where metrics go: jsonl, tensorboard, wandb", resume_free=True
    )


@dataclass(frozen=True)
class InitConfig:
    """What a new run starts from instead of random parameters. Read once, before the first step."""

    path: str = key("", "a run, a folder written by `mg3d import`, or an exported folder", neutral="")
    take: tuple[str, ...] = key((".*",), "regexes of the parameters to take; each must match some", neutral=(".*",))
    leave: tuple[str, ...] = key((), "regexes of parameters not to take, of those that `take` matches", neutral=())
    whole: bool = key(
        False,
        "take all of the state of a run: optimizer, average, step and place in the data, too (RUN@STEP; training.keep_steps)",
        neutral=False,
    )


@dataclass(frozen=True)
class Config:
    """A whole configuration."""

    name: str = key("mg3d", "what the run is called", resume_free=True)
    seed: int = key(0, "of parameters, order of the samples, masks, views and dropout")
    plugins: tuple[str, ...] = key((), "modules that register objectives, towers, ... of your own", neutral=())
    init_from: InitConfig = key(None, "", factory=InitConfig, neutral=None)
    data: DataConfig = key(None, "", factory=DataConfig)
    model: ModelConfig = key(None, "", factory=ModelConfig)
    objectives: Group = key(None, "", factory=lambda: _default_options(OBJECTIVES))
    tasks: Group = key(None, "", factory=lambda: _default_options(TASKS), neutral=None)
    evaluations: Group = key(None, "", factory=lambda: _default_options(EVALUATIONS), neutral=None, resume_free=True)
    optimizer: OptimizerConfig = key(None, "", factory=OptimizerConfig)
    schedule: ScheduleConfig = key(None, "", factory=ScheduleConfig)
    training: TrainingConfig = key(None, "", factory=TrainingConfig)
    mesh: MeshConfig = key(None, "", factory=MeshConfig)

    @property
    def grid(self) -> tuple[int, int, int]:
        """Voxels along each axis of the prepared volumes."""
        x, y, z = self.data.grid or self.model.volume_size
        return x, y, z

    def text_tokens(self) -> int:
        """Tokens of one text as the alignment objective gives it to the report encoder: a sentence, or a whole report."""
        alignment = self.objectives["alignment"]
        return self.data.max_tokens if alignment.report_view == "report" else alignment.sentence_tokens


# Groups of a configuration whose keys come from a registry: `GROUP.NAME.KEY`, with an entry for every registered name.
DECLARED: dict[str, Registry[Any]] = {"objectives": OBJECTIVES, "tasks": TASKS, "evaluations": EVALUATIONS}


def options_of(item: Any) -> type:
    """The class of the options that an objective, task, evaluation or tower declares."""
    return checked_options(item.options)


def _default_options(registry: Registry[Any]) -> Group:
    return Group({name: options_of(item)() for name, item in registry.items()})


def tower_defaults(towers: Registry[Any]) -> dict[str, Any]:
    """The options of all kinds of one encoder in one flat dict, at their defaults."""
    return _flat_options(towers, lambda options: options_lib.to_dict(options()))


def tower_neutral(towers: Registry[Any]) -> dict[str, Any]:
    """The options of all kinds of one encoder in one flat dict, at their neutral values (`options.key`)."""
    return _flat_options(towers, options_lib.neutral)


def _flat_options(towers: Registry[Any], values_of: Callable[[type], dict[str, Any]]) -> dict[str, Any]:
    """`values_of` every kind's options, merged. Two kinds may share the name of an option only with the same value."""
    merged: dict[str, Any] = {}
    for kind, tower in towers.items():
        for name, value in values_of(options_of(tower)).items():
            if merged.setdefault(name, value) != value:
                raise ValueError(
                    f"{towers.kind} {kind}: option {name!r} has another default in another kind: rename it"
                )
    return merged


def assemble(values: Mapping[str, Any]) -> tuple[Config, list[str]]:
    """The typed configuration of a nested mapping with all keys, and the list of what is wrong with it.

    Problems are returned, not raised: one line for each key, which then keeps its default.
    """
    problems: list[str] = []
    # What `options.build` cannot read off the dataclasses: groups of a registry, and encoders, whose options are flat.
    custom = {
        **{name: _group_builder(registry) for name, registry in DECLARED.items()},
        "model.volume_encoder": _encoder_builder(VolumeEncoderConfig),
        "model.report_encoder": _encoder_builder(ReportEncoderConfig),
    }
    return options_lib.build(Config, values, "", problems, custom), problems


def _group_builder(registry: Registry[Any]) -> Callable[[Any, str, list[str]], Group]:
    """Builds a `Group` with the options of every registered item; unknown and missing names are problems."""

    def build(values: Mapping[str, Any], full: str, problems: list[str]) -> Group:
        problems += options_lib.unknown(values, registry, f"{full}.")
        problems += [f"{full}.{name} is missing" for name in registry if name not in values]
        present = {name: item for name, item in registry.items() if name in values}
        return Group({
            name: options_lib.build(options_of(item), values[name], f"{full}.{name}.", problems)
            for name, item in present.items()
        })  # fmt: skip

    return build


def _encoder_builder(part: type[EncoderConfig]) -> Callable[[Any, str, list[str]], EncoderConfig]:
    """Builds a `VolumeEncoderConfig` or `ReportEncoderConfig` from flat keys: common ones, and options of the chosen kind.

    Options of other kinds may be there, because `config.default()` lists them all, but only at their defaults.
    """

    def build(values: Mapping[str, Any], full: str, problems: list[str]) -> EncoderConfig:
        towers, defaults = part.towers(), tower_defaults(part.towers())  # `defaults`: options of all kinds
        common = {name: values[name] for name in values if name not in defaults}
        kind = values.get("kind", part().kind)
        if kind not in towers:
            problems += options_lib.choice(f"{full}.kind", kind, tuple(towers))
            return part()
        options_type = options_of(towers[kind])
        names = {field.name for field in fields(options_type)}
        for name in sorted(defaults.keys() - names):  # options of other kinds
            if options_lib.tuples(values.get(name, defaults[name])) != defaults[name]:
                remedy = f"means nothing with kind = {kind!r}: leave it at {defaults[name]!r}"
                problems.append(options_lib.problem(f"{full}.{name}", values[name], remedy))
        given = {name: values[name] for name in names if name in values}
        options: Any = options_lib.build(options_type, given, f"{full}.", problems)
        return options_lib.build(
            part,
            common | {"options": options},
            f"{full}.",
            problems,
            {f"{full}.options": lambda value, *_: value},  # built above, so it stays as it is
        )

    return build

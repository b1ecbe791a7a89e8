"""The default configuration, and loading with overrides.

A config file is Python with `get_config(arg)` returning an `ml_collections.ConfigDict`; it starts from `default()` and
changes what it must. On the command line `--config FILE[:arg] --config.optimizer.learning_rate=1e-4` overrides any key.
`config_check.validate` says what is impossible before anything is built.
"""

from __future__ import annotations

import argparse
import difflib
import hashlib
import json
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_flags

from mg3d_jax.errors import UserError
from mg3d_jax.files import read_json


def _group(**values: Any) -> ConfigDict:
    return ConfigDict(values)


def default() -> ConfigDict:
    """Every key there is, with the paper's setting where the paper has one (see the design notes in docs/)."""
    config = ConfigDict()
    config.name = "mg3d"
    config.seed = 0
    config.data = _group(
        train=(),  # folders made by `mg3d prepare`
        valid=(),  # held-out folder(s) for the loss during training; may stay empty
        batch_size=64,  # global: all devices of all processes together
        max_patients=0,  # train on the first K patients only (nested subsets); 0 = all
        tokenizer="train",  # "train": a WordPiece tokenizer of the training reports; else a Hugging Face name or folder
        vocab_size=4096,  # of a tokenizer trained here
        max_tokens=250,
        max_sentences=32,
        windows=((-1000.0, 1000.0),),  # HU windows, one channel each, scaled to [0, 1] on the device
        shuffle_reports=False,  # control experiment: pairs every volume with another patient's report
        weights=(),  # share of each folder of `train` among the samples, e.g. (3, 1); empty: as many as it has records
        max_bad_records=100,  # records that fail their checksum are skipped, counted and named; one more ends the run
        workers=0,  # grain worker processes per host; 0 reads in the main process
        read_threads=4,
        augment=_group(shift=0, scale=0.0, offset=0.0, noise=0.0),  # voxels; relative; HU; HU standard deviation
    )
    config.model = _group(
        volume_size=(128, 128, 96),
        volume_encoder=_group(
            kind="vit",  # "vit", or "swin": MONAI's SwinUNETR encoder, the paper's backbone
            preset="b",  # of a ViT: ti s b l h g; of a Swin: swin-b, swin-l, and swin-b-v2, swin-l-v2
            patch_size=(16, 16, 16),
            stem="linear",
            positions="sincos",
            pooling="attention",  # "attention", "mean", or "flatten": a linear layer over all tokens, as CT-CLIP
            num_registers=0,
            qk_norm=False,
            layer_scale=0.0,
            norm_epsilon=1e-6,  # of a ViT; MONAI's have 1e-5
            exact_gelu=False,  # of a ViT: the error function, as MONAI's, in place of the tanh form
            merging="merging",  # of a Swin: MONAI's `downsample` that its weights were trained with; or "mergingv2"
            dropout=0.0,
            pretrained="",  # a folder written by `mg3d import`
            frozen_layers=0,  # the embedding and the first k layers are not trained; -1: the whole encoder
        ),
        report_encoder=_group(
            preset="base",  # pico nano mini base roberta-base
            max_positions=512,
            dropout=0.0,
            pretrained="",  # a BERT-type checkpoint: a folder or a name on the hub; its tokenizer goes to data.tokenizer
            frozen_layers=0,
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
        name="adamw",  # or "muon" for matrices, with AdamW for the rest
        learning_rate=1e-4,
        b1=0.9,
        b2=0.98,
        weight_decay=0.05,
        clip_norm=1.0,
        accumulation=1,  # micro-batches per step
        gradient_cache=False,  # with accumulation > 1: the exact gradient of the whole batch, for one more forward pass
        learning_rate_multipliers=((".*", 1.0),),  # (regex, factor): the first match counts, every parameter must match
        no_weight_decay=(".*(bias|scale|position|embedding|pool/query|logit_scale|logit_bias).*",),
        freeze=(),  # regexes of parameters that are not trained
        ema=0.0,  # decay of the exponential moving average of the parameters, e.g. 0.999; 0 keeps none
    )
    # Lengths: the first of _steps, _epochs, _samples that is set counts, else _percent of the run.
    config.schedule = _group(
        kind="linear",  # "linear" or "cosine" decay, or "constant" with a cooldown
        warmup_steps=0,
        warmup_epochs=0.0,
        warmup_samples=0,
        warmup_percent=5.0,
        cooldown_steps=0,
        cooldown_epochs=0.0,
        cooldown_samples=0,
        cooldown_percent=20.0,
        final_fraction=0.0,
    )
    config.training = _group(
        steps=0,  # exactly one of steps, epochs, samples is set
        epochs=0.0,
        samples=0,
        log_every=10,
        validate_every=0,  # held-out loss (and reconstructed slices) every so many steps; 0 = only at the end
        evaluate_every=0,  # zero-shot AUROC and recall on data.valid every so many steps; 0 = never
        checkpoint_every=100,
        keep_checkpoints=2,  # the newest
        best_metric="",  # keeps the checkpoint that is best by this too: "valid/loss", "evaluation/auroc_macro", ...
        best_mode="min",
        max_skipped=10,  # updates with a non-finite loss or gradient are skipped; so many in a row end the run
        watchdog_minutes=30.0,  # a step that takes longer is reported with the stacks of every process; 0 = never
        writers=("jsonl", "tensorboard"),  # and "wandb"
    )
    config.mesh = _group(
        preset="",  # sizes by hardware, see sharding.MESH_PRESETS; the three sizes below then stay as they are
        data=-1,
        fsdp=1,
        tensor=1,
        slices=1,  # TPU slices, or groups of hosts, over whose slow links only the data axis goes
        max_replicated=0.1,  # largest share of the parameters that may stay whole on an fsdp or tensor mesh
    )
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
        # Of the file itself (a wrong ARG, a mistyped group), or of an override.
        if not overrides:
            raise UserError(f"config {path}: {type(error).__name__}: {error}") from error
        raise UserError(_unknown_key(path, overrides, error)) from error
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


def wrong_keys(config: ConfigDict) -> list[str]:
    """Keys that `default()` does not have, with the nearest that it has, and those that are missing."""
    given, known = flatten(config), flatten(default())
    wrong = []
    for key in sorted(given.keys() - known.keys()):
        close = difflib.get_close_matches(key, known, 1, 0.4)
        wrong.append(f"there is no key {key}" + (f": did you mean {close[0]}?" if close else ""))
    return wrong + [f"{key} is missing" for key in sorted(known.keys() - given.keys())]


def to_json(config: ConfigDict) -> str:
    return json.dumps(config.to_dict(), indent=1, sort_keys=True)


def from_json(text: str) -> ConfigDict:
    """The config that `to_json` wrote; lists become tuples again."""

    def tuples(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: tuples(v) for k, v in value.items()}
        return tuple(map(tuples, value)) if isinstance(value, list) else value

    return ConfigDict(tuples(json.loads(text))).lock()


def read(path: Path) -> ConfigDict:
    """The config of a run, from its `config.json`. `UserError` where it cannot be read or is of another version."""
    config = from_json(json.dumps(read_json(path)))
    if wrong := wrong_keys(config):
        raise UserError(
            f"{path}: " + "; ".join(wrong) + ". The run was trained by another version of this code: use that one"
        )
    return config


def text_tokens(config: ConfigDict) -> int:
    """Length of one text as the alignment shows it to the report encoder: a sentence, or a whole report."""
    options = config.objectives.alignment
    return options.sentence_tokens if options.report_view == "sentences" else config.data.max_tokens


# Keys that may differ between the run that wrote a checkpoint and the one that resumes it: they change neither the
# model nor the sequence of batches nor the optimisation.
RESUME_FREE = (
    "name", "data.workers", "data.read_threads", "data.train", "data.valid", "data.max_bad_records", "training.log_every",
    "training.validate_every", "training.evaluate_every", "training.checkpoint_every", "training.keep_checkpoints",
    "training.best_metric", "training.best_mode", "training.max_skipped", "training.watchdog_minutes", "training.writers",
    "mesh.preset", "mesh.data", "mesh.fsdp", "mesh.tensor", "mesh.slices", "mesh.max_replicated", "model.remat",
    "model.attention",
)  # fmt: skip


def config_hash(config: ConfigDict) -> str:
    """12 hex digits over every key that matters for the result."""
    kept = {k: v for k, v in flatten(config).items() if k not in RESUME_FREE}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()[:12]


def resume_differences(old: ConfigDict, new: ConfigDict) -> list[str]:
    """`["optimizer.learning_rate: 0.001 -> 0.0001", ...]` for the keys that must not change within a run."""
    a, b = (flatten(from_json(to_json(config))) for config in (old, new))  # a list is as good as a tuple
    keys = sorted((a.keys() | b.keys()) - set(RESUME_FREE))
    return [f"{k}: {a.get(k, 'absent')} -> {b.get(k, 'absent')}" for k in keys if a.get(k) != b.get(k)]

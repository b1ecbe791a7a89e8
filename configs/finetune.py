"""Fine-tuning of the whole volume encoder on the labels of the records, from a run that was pre-trained.

    mg3d train --config configs/finetune.py:RUN --workdir FINETUNED \
        --config.data.train=DATA/train --config.data.valid=DATA/valid

RUN (or RUN@STEP) gives the model, the windows and the tokenizer; all of its parameters are taken, and the volume encoder
and a new head are trained: the report encoder stays, so that zero-shot classification can still be asked for. Without the
argument the volume encoder is that of configs/pretrain.py and starts from any source that fits:

    mg3d train --config configs/finetune.py --init-from SOURCE --workdir FINETUNED ...

The learning rate falls from layer to layer towards the input by `optimizer.layer_decay`. The held-out AUROC of the head is
measured while it trains, and the checkpoint where it is highest is kept. `tasks.classification.kind=multi_class` is for
labels that exclude one another, with `training.best_metric=evaluation/classification/accuracy`; `num_labels` is the number
of labels of a record. Learning rate and decay are those that the literature fine-tunes a ViT-B with (He et al. 2022).
"""

from ml_collections import ConfigDict

from mg3d_jax import config as config_lib
from mg3d_jax.errors import UserError
from mg3d_jax.interop.finetune import like_run
from mg3d_jax.interop.sources import folder_and_step


def get_config(arg: str = "") -> ConfigDict:
    config = config_lib.default().unlock()
    config.name = "finetune"
    if arg:
        _like(config, arg)
    else:
        config.init_from.take = ("volume_encoder/.*",)
        config.model.report_encoder.preset = "pico"  # not read
    for objective in config.objectives.values():
        objective.weight = 0.0
    config.tasks.classification.weight = 1.0
    config.optimizer.freeze = ("(?!volume_encoder/|classification_head/).*",)
    config.optimizer.layer_decay = 0.75
    config.optimizer.learning_rate = 5e-4
    config.optimizer.b2 = 0.999
    config.data.batch_size = 64
    config.schedule.kind = "cosine"
    config.schedule.warmup_percent = 5.0
    config.training.steps = 10_000
    config.training.evaluate_every = 500
    config.training.best_metric = "evaluation/classification/auroc_macro"
    config.training.best_mode = "max"
    for name, evaluation in config.evaluations.items():
        evaluation.every = 0 if name == "classification" else -1
    return config.lock()


def _like(config: ConfigDict, run: str) -> None:
    """Model, windows and texts as in a run, and its parameters to start from."""
    folder, _ = folder_and_step(run)
    if not (folder / "config.json").is_file():
        raise UserError(f"configs/finetune.py:{run}: {folder} is no run of `mg3d train`, it has no config.json")
    like_run(config, folder)
    config.init_from.path = run

"""CT-RATE, 18 abnormalities, with prompts as classes: the fine-tuned model still answers any prompt (`tasks/vocabulary.py`).

    mg3d finetune --config configs/downstream/ct_rate_vocabulary.py --init-from RUN --workdir FINETUNED \\
        --config.data.train=DATA/train --test DATA/valid

RUN gives both towers and the tokenizer; volume encoder and projection are trained, the report side stays. The numbers are
those of the zero-shot evaluation with the prompts that were trained. `:small` is for phantoms and a run of the quickstart, of
which the volume encoder stays, too.
"""

from ml_collections import ConfigDict

from mg3d_jax.data.abnormalities import ABNORMALITIES
from mg3d_jax.interop import finetune


def get_config(arg: str = "") -> ConfigDict:
    config = finetune.begin(
        arg, "ct-rate-vocabulary", volume_size=(128, 128, 96), windows=((-1000.0, 1000.0),), heads=("volume_projection",),
        reports=True,
    )  # fmt: skip
    config.tasks.vocabulary.update({"weight": 1.0, "labels": ABNORMALITIES})
    config.evaluations.zero_shot.every = 0
    if finetune.SMALL in arg.split(","):  # from a run that has seen as many volumes: its projection alone is trained
        config.training.steps = 400
        if config.init_from.path:
            config.model.volume_encoder.frozen_layers = -1
    return config.lock()

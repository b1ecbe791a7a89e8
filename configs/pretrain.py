"""The paper's setting: all objectives of MG-3D on CT-RATE (+ CTRG), a ViT over 128 x 128 x 96 voxels.

    mg3d train --config configs/pretrain.py --workdir RUN --config.data.train=DATA/train --config.data.valid=DATA/valid

Argument: a preset of the volume encoder (`ti s b l h g`, `swin-b swin-l`; default `b`), and after a comma the objectives
(`clip siglip mae mg3d`; default `mg3d`), e.g. `configs/pretrain.py:l,clip`. Learning rate, schedule, weight decay,
multipliers and weights are the paper's (batch 4 per GPU there; `data.batch_size` is global here). Not run at this size yet.

The report encoder is trained from scratch unless a pre-trained one is named; the paper freezes RadBERT:

    --config.model.report_encoder.pretrained=NAME --config.data.tokenizer=NAME \
    --config.model.report_encoder.frozen_layers=-1 --config.objectives.matching.sentence_source=encoder

The paper's own backbone is `configs/pretrain.py:swin-b`.
"""

from ml_collections import ConfigDict

from mg3d_jax import config as config_lib


def get_config(arg: str = "") -> ConfigDict:
    preset, _, objectives = (arg or "b").partition(",")
    config = config_lib.default().unlock()
    config.name = f"pretrain-{preset}"
    config.model.volume_encoder.preset = preset
    if preset.startswith("swin"):
        config.model.volume_encoder.kind = "swin"
    config_lib.use_objectives(config, objectives or "mg3d")
    # Means of an encoder that is being trained drift together; fixed word vectors do not.
    config.objectives.matching.sentence_source = "words"
    config.data.batch_size = 64
    config.optimizer.learning_rate = 1e-5
    config.optimizer.weight_decay = 1e-8
    config.optimizer.learning_rate_multipliers = ((r"(?!volume_encoder|report_encoder).*", 5.0), (".*", 1.0))
    config.schedule.kind = "linear"
    config.schedule.warmup_steps = 10_000
    config.training.steps = 300_000
    config.training.log_every = 50
    config.training.checkpoint_every = 1000
    config.training.validate_every = 5000
    return config.lock()

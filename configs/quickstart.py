"""Quickstart: contrastive pre-training on phantom chest CT, on two CPU cores.

    mg3d phantom RUN/phantoms --patients 700 --valid 200 --seed 0
    mg3d prepare --source ctrate --root RUN/phantoms --split train --out RUN/train --size 48 48 32 --spacing 7 7 9
    mg3d train --config configs/quickstart.py --workdir RUN/run --config.data.train=RUN/train

`bash launch/quickstart.sh` does all of it. Argument `long` trains for ten times as many steps.
"""

from ml_collections import ConfigDict

from mg3d_jax import config as config_lib


def get_config(arg: str = "") -> ConfigDict:
    config = config_lib.default().unlock()
    config.name = "quickstart"
    config.model.volume_size = (48, 48, 32)
    config.model.volume_encoder.preset = "nano"
    config.model.volume_encoder.patch_size = (8, 8, 8)
    config.model.volume_encoder.stem = "conv"
    config.model.report_encoder.preset = "nano"
    config.model.projection_dim = 128
    config.model.dtype = "float32"
    config.model.remat = "none"
    config.data.batch_size = 32
    config.data.vocab_size = 1500
    config.objectives.alignment.report_sentences = 4
    config.objectives.alignment.report_tokens = 64
    config.optimizer.learning_rate = 1e-3
    config.schedule.warmup_percent = 5.0
    config.training.steps = {"": 400, "long": 4000}[arg]
    return config.lock()

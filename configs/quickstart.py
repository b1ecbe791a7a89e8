"""Quickstart: contrastive pre-training on phantom chest CT, on two CPU cores.

    mg3d phantom RUN/phantoms --patients 700 --valid 200 --seed 0
    mg3d prepare --source ctrate --root RUN/phantoms --split train --out RUN/train --size 48 48 32 --spacing 7 7 9
    mg3d train --config configs/quickstart.py --workdir RUN/run --config.data.train=RUN/train

`bash launch/quickstart.sh` does all of it. Argument `long` trains twice as long.
"""

from ml_collections import ConfigDict

from mg3d_jax import config as config_lib


def get_config(arg: str = "") -> ConfigDict:
    config = config_lib.default().unlock()
    config.name = "quickstart"
    config.model.volume_size = (48, 48, 32)
    config.model.volume_encoder.preset = "pico"
    config.model.volume_encoder.patch_size = (12, 12, 8)
    config.model.volume_encoder.positions = "learned"
    config.model.volume_encoder.layer_scale = 0.1
    config.model.volume_encoder.pooling = "flatten"
    config.model.report_encoder.preset = "pico"
    config.model.projection_dim = 128
    config.model.dtype = "float32"
    config.model.remat = "none"
    config.data.batch_size = 16
    config.data.vocab_size = 1500
    config.data.windows = ((-1000.0, -400.0), (-160.0, 240.0), (200.0, 1200.0))  # lung, mediastinum, calcification
    config.objectives.alignment.report_sentences = 16
    config.objectives.alignment.sentence_tokens = 28
    # A young model's pairs are not aligned yet; with a low temperature it first learns to make all of them alike.
    config.objectives.alignment.temperature = 0.5
    config.objectives.alignment.learn_temperature = True
    config.optimizer.learning_rate = 1e-3
    config.schedule.warmup_percent = 5.0
    config.training.steps = {"": 700, "long": 1400}[arg]
    return config.lock()

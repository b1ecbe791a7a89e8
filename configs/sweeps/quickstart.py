"""Scaling-law sweep over phantom chest CT, in miniature: 2 model sizes x 2 numbers of patients, on two CPU cores.

    mg3d sweep plan --config configs/sweeps/quickstart.py --workdir RUN/sweep --set data.train=RUN/train --set data.valid=RUN/valid
    mg3d sweep run  (the same arguments)
    mg3d sweep fit --workdir RUN/sweep

`RUN/train` and `RUN/valid` are made as configs/quickstart.py says. Four runs show the road, not a law: `fit` writes the
table and the plots and refuses to name five parameters. Argument `grid` declares 4 sizes x 4 numbers of patients x 2
seeds, enough for a law.
"""  # noqa: E501

from ml_collections import ConfigDict

# The learning rate falls with the width: one rate for all sizes would tilt the law towards the small models.
MODELS = {
    "nano": {
        "model.volume_encoder.preset": "nano",
        "model.report_encoder.preset": "nano",
        "optimizer.learning_rate": 1e-3,
    },
    "ti": {"model.volume_encoder.preset": "ti", "model.report_encoder.preset": "nano", "optimizer.learning_rate": 7e-4},
    "s": {"model.volume_encoder.preset": "s", "model.report_encoder.preset": "mini", "optimizer.learning_rate": 4e-4},
    "b": {"model.volume_encoder.preset": "b", "model.report_encoder.preset": "base", "optimizer.learning_rate": 2e-4},
}


def get_config(arg: str = "") -> ConfigDict:
    models, patients, seeds = {
        "": (("nano", "ti"), (100, 400), (0,)),
        "grid": (("nano", "ti", "s", "b"), (75, 150, 300, 600), (0, 1)),
    }[arg]
    sweep = ConfigDict()
    sweep.name = "quickstart"
    sweep.base = "../quickstart.py"
    sweep.models = tuple((name, tuple(MODELS[name].items())) for name in models)
    sweep.patients = patients
    sweep.seeds = seeds
    # Patches of 12 x 12 x 8 voxels: 64 tokens a volume, so that the larger size trains in minutes.
    sweep.overrides = (("model.volume_encoder.patch_size", (12, 12, 8)),)
    sweep.length = ("epochs", 8.0)
    sweep.loss = "valid/alignment"
    sweep.model_size = "n_active"
    sweep.data_size = "unique_patients"
    return sweep

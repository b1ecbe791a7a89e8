"""Scaling-law sweep over phantom chest CT, in miniature: 2 model sizes x 2 numbers of patients, on two CPU cores.

    mg3d sweep run --config configs/sweeps/quickstart.py --workdir RUN/sweep \\
        --set data.train=RUN/train --set data.valid=RUN/valid
    mg3d sweep fit --workdir RUN/sweep

`mg3d sweep plan` takes the arguments of `run` and only says what it would do.

`RUN/train` and `RUN/valid` are made as configs/quickstart.py says. Four runs show how it is done, and give no law: `fit`
writes the table and the plots and refuses to name five parameters. Argument `grid` declares 4 sizes x 4 numbers of
patients x 2 seeds, enough for a law, and takes hours.
"""

from ml_collections import ConfigDict


def model(preset: str, report: str, learning_rate: float) -> tuple:
    """Overrides of a model size. The rate falls with the width: one for all would tilt the law towards small models."""
    return (
        ("model.volume_encoder.preset", preset),
        ("model.report_encoder.preset", report),
        ("optimizer.learning_rate", learning_rate),
    )


MODELS = {
    "pico": model("pico", "nano", 1e-3),
    "nano": model("nano", "nano", 1e-3),
    "ti": model("ti", "nano", 7e-4),
    "s": model("s", "mini", 4e-4),
}


def get_config(arg: str = "") -> ConfigDict:
    models, patients, seeds = {
        "": (("pico", "ti"), (100, 400), (0,)),
        "grid": (("pico", "nano", "ti", "s"), (75, 150, 300, 600), (0, 1)),
    }[arg]
    sweep = ConfigDict()
    sweep.name = "quickstart"
    sweep.base = "../quickstart.py:scratch"
    sweep.models = tuple((name, MODELS[name]) for name in models)
    sweep.patients = patients
    sweep.seeds = seeds
    sweep.subset_seeds = tuple(seed + 1 for seed in seeds)  # each draws patients of its own
    if arg == "grid":
        sweep.check = ("optimizer.learning_rate", (0.5, 1, 2))
    # One loss for all runs, whatever their batches: over pools of 128 held-out patients, after the last step.
    sweep.overrides = (("evaluations.pool_loss.every", 1_000_000),)
    sweep.length = ("epochs", 8.0)
    sweep.loss = "evaluation/pool_loss"
    sweep.model_size = "n_active"
    sweep.data_size = "unique_patients"
    return sweep

"""Fine-tuning with 1, 10 and 100 % of the patients' labels, of every run of a sweep that pre-trained: the paper's yardstick.

    mg3d sweep run --config configs/sweeps/finetune.py:RUN/multitask --workdir RUN/finetuned \\
        --set data.train=RUN/train --set data.valid=RUN/valid
    mg3d sweep compare --workdir RUN/finetuned

The argument is the folder of that sweep, all of whose runs are done. The volume encoder of each of its methods (of its last
stage) and a new head are trained on the labels of the first 1, 10 and 100 % of the patients of one order, with the seed of the
run, beside `no-pretraining`. The table has the AUROC of the head on held-out patients after the last step, as nothing is chosen
while it trains; a column for each number of patients. 200 steps of 32 volumes whatever their number.
"""

from pathlib import Path

from ml_collections import ConfigDict

from mg3d_jax.errors import UserError
from mg3d_jax.registry import EVALUATIONS, OBJECTIVES
from mg3d_jax.scaling.sweep.declaration import read_declaration

STEPS = 200
PERCENT = (1, 10, 100)


def get_config(arg: str = "") -> ConfigDict:
    if not arg:
        raise UserError("configs/sweeps/finetune.py:FOLDER: give the folder of the sweep whose runs are fine-tuned")
    before = read_declaration(Path(arg))
    patients = max(run.patients for run in before.runs)
    stages = {Path(run.after).name for run in before.runs}
    methods = tuple(dict.fromkeys(run.model for run in before.runs if run.id not in stages))
    start = (("init_from.take", ("volume_encoder/.*",)),)
    sweep = ConfigDict()
    sweep.name = f"{before.name}-finetuned"
    sweep.base = "../quickstart.py:scratch"  # the report encoder is not trained, and nothing reads it
    sweep.models = (*((method, start) for method in methods), ("no-pretraining", ()))
    sweep.patients = tuple(sorted({max(1, round(patients * percent / 100)) for percent in PERCENT}))
    sweep.seeds = tuple(dict.fromkeys(run.seed for run in before.runs))
    sweep.overrides = (
        *((f"objectives.{name}.weight", 0.0) for name in OBJECTIVES),
        ("tasks.classification.weight", 1.0),
        ("optimizer.freeze", ("(?!volume_encoder/|classification_head/).*",)),
        ("optimizer.layer_decay", 0.75),
        ("training.evaluate_every", 1_000_000),  # at the end
        *((f"evaluations.{name}.every", -1) for name in EVALUATIONS if name != "classification"),
    )
    sweep.length = ("steps", STEPS)
    sweep.starts_from = tuple((method, method) for method in methods)
    sweep.starts_in = arg
    sweep.loss = "evaluation/classification/auroc_macro"
    sweep.model_size = "n_active"
    sweep.data_size = "unique_patients"
    return sweep

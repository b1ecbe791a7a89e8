"""A law of the volume encoder's size and the number of patients, for contrast alone and for MG-3D's terms, on two CPU cores.

    mg3d phantom RUN/phantoms --patients 1400 --valid 320 --seed 12 --style plain   # for clip
    mg3d phantom RUN/phantoms --patients 2800 --valid 320 --seed 11                 # for mg3d
    mg3d prepare ...                                                                # both splits, as configs/quickstart.py says
    mg3d sweep run --config configs/sweeps/scaling.py:clip --workdir RUN/clip --at-once 2 \\
        --set data.train=RUN/train --set data.valid=RUN/valid --set model.report_encoder.features=RUN/features
    mg3d sweep fit --workdir RUN/clip --chance 4.85203                              # log 128; for mg3d without

Arguments: `clip`, volumes against reports, 16 epochs, whose law is that of the contrastive loss over fixed pools; or `mg3d`,
the paper's terms at their weights, 2 epochs. Its loss is a weighted sum, which has no law; the law is that of one term, the
masked volumes. Both have the quickstart's frozen pre-trained report encoder, so that only the volume encoder grows: 4 widths
of two layers x 4 numbers of patients x 2 seeds, each with patients of its own. As epochs are fixed, D is the number of patients
and, in proportion, of steps. The learning rate of a size follows one rule, which is checked at the smallest and the largest
size. docs/scaling.md has what was measured, `mg3d` at 0.4 times this rate.
"""

from ml_collections import ConfigDict

from mg3d_jax.errors import UserError
from mg3d_jax.registry import EVALUATIONS

EPOCHS = {"clip": 16.0, "mg3d": 2.0}
BATCH_SIZE = {"clip": 32, "mg3d": 8}
RATE = {"clip": 6e-4, "mg3d": 3.75e-3}  # of a million parameters
LOSS = {"clip": "evaluation/pool_loss", "mg3d": "valid/volume_reconstruction"}
SIZES = ("zepto", "atto", "femto", "pico")
PATIENTS = {"clip": (160, 320, 640, 1280), "mg3d": (200, 400, 800, 1600)}
TERMS = {
    "clip": {"alignment.weight": 1.0, "negation.weight": 0.0},
    "mg3d": {
        "alignment.weight": 0.1,
        "alignment.fused_weight": 1.0,
        "negation.weight": 0.0,
        "volume_reconstruction.weight": 1.0,
        "matching.weight": 0.1,
        "discrimination.weight": 0.1,
    },
}
# With a frozen encoder the terms read features of sentences (`configs/sweeps/multitask.py`); small modules beside small towers.
MODULES = {
    "clip": (),
    "mg3d": (
        ("model.report_input", "sentences"),
        ("model.fusion.depth", 1),
        ("model.fusion.other_volumes", 1),
        ("model.voxel_decoder.width", 64),
        ("model.voxel_decoder.depth", 1),
        ("model.voxel_decoder.num_heads", 4),
        ("model.matching_dim", 64),
    ),
}


def get_config(arg: str = "clip") -> ConfigDict:
    if arg not in TERMS:
        raise UserError(f"configs/sweeps/scaling.py:{arg}: clip or mg3d")
    sweep = ConfigDict()
    sweep.name = f"scaling-{arg}"
    sweep.base = "../quickstart.py:pretrained"
    sweep.models = tuple((size, (("model.volume_encoder.preset", size),)) for size in SIZES)
    sweep.patients = PATIENTS[arg]
    sweep.seeds = (0, 1)
    sweep.subset_seeds = (1, 2)
    sweep.overrides = (
        *((f"objectives.{name}", weight) for name, weight in TERMS[arg].items()),
        *MODULES[arg],
        ("data.batch_size", BATCH_SIZE[arg]),
        *((f"evaluations.{name}.every", -1) for name in EVALUATIONS if name != "pool_loss"),
        ("evaluations.pool_loss.every", 1_000_000 if arg == "clip" else -1),  # at the end
    )
    sweep.length = ("epochs", EPOCHS[arg])
    sweep.rule = (("optimizer.learning_rate", RATE[arg], 1e6, -0.1),)
    sweep.check = ("optimizer.learning_rate", (0.4, 1, 2.5))
    sweep.loss = LOSS[arg]
    sweep.model_size = "n_vision"
    sweep.data_size = "unique_patients"
    return sweep

"""What each objective does: the quickstart model with all of MG-3D's terms, and with each of them left out, 3 seeds each.

    mg3d sweep run --config configs/sweeps/ablation.py --workdir RUN/ablation \\
        --set data.train=RUN/train --set data.valid=RUN/valid
    mg3d sweep compare --workdir RUN/ablation

`RUN/train` and `RUN/valid` are made as configs/quickstart.py says. The same seeds, data and number of steps for all; the
first variant is what the others are compared with. 700 steps as in the quickstart: 21 runs of 10 to 25 minutes on one core
each; start the command twice and two run at a time. Argument `short` trains 150 steps, too few to tell the terms apart.
"""

from ml_collections import ConfigDict

# All terms on. The weights bring the gradients of the five losses to the same order at this size (not the paper's, which
# are for a pre-trained, frozen report encoder); sentences are compared by fixed word vectors, as the encoder is trained.
ALL = (
    ("objectives.alignment.fused_weight", 0.5),
    ("objectives.volume_reconstruction.weight", 1.0),
    ("objectives.report_reconstruction.weight", 0.2),
    ("objectives.matching.weight", 0.5),
    ("objectives.matching.sentence_source", "words"),
    ("objectives.discrimination.weight", 0.2),
    ("model.fusion.depth", 1),
    ("model.voxel_decoder.width", 128),
    ("model.voxel_decoder.depth", 1),
    ("model.voxel_decoder.num_heads", 4),
    ("model.matching_dim", 64),
    ("training.evaluate_every", 100_000),  # at the end
)


def without(*keys: str) -> tuple:
    return tuple((f"objectives.{key}", 0.0) for key in keys)


VARIANTS = (
    ("all", ()),
    ("no-alignment", without("alignment.weight")),
    ("no-volume-reconstruction", without("volume_reconstruction.weight")),
    ("no-report-reconstruction", without("report_reconstruction.weight")),
    ("no-matching", without("matching.weight")),
    ("no-discrimination", without("discrimination.weight")),
    (
        "alignment-only",
        without(
            "alignment.fused_weight",
            "volume_reconstruction.weight",
            "report_reconstruction.weight",
            "matching.weight",
            "discrimination.weight",
        ),
    ),
)


def get_config(arg: str = "") -> ConfigDict:
    sweep = ConfigDict()
    sweep.name = "ablation"
    sweep.base = "../quickstart.py"
    sweep.models = VARIANTS
    sweep.patients = (700,)
    sweep.seeds = (0, 1, 2)
    sweep.overrides = ALL
    sweep.length = ("steps", {"": 700, "short": 150}[arg])
    sweep.loss = "evaluation/auroc_macro"
    sweep.model_size = "n_active"
    sweep.data_size = "unique_patients"
    return sweep

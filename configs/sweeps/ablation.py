"""What each objective does: the quickstart model with all of MG-3D's terms, and with each of them left out, 3 seeds each.

    mg3d sweep run --config configs/sweeps/ablation.py --workdir RUN/ablation \\
        --set data.train=RUN/train --set data.valid=RUN/valid
    mg3d sweep compare --workdir RUN/ablation

`RUN/train` and `RUN/valid` are made as configs/quickstart.py says. The same seeds, data and number of steps for all; the
first variant is what the others are compared with. 300 steps: 24 runs of 3 to 10 minutes on one core each; start the
command twice and two run at a time. Argument `long` trains 700 steps, as the quickstart; `long-ends` only all terms and
alignment alone (6 runs).
"""

from ml_collections import ConfigDict

# All terms on, the other terms beside the alignment small. At the paper's weights (for a pre-trained, frozen report encoder)
# or at equal ones the alignment of this young model hardly starts: fused pair, matching and discrimination are solved
# within 100 steps by what a report says of itself, and their gradient on the volume encoder is 2 to 3 times the
# alignment's. Sentences are compared by fixed word vectors, as the encoder is trained.
ALL = (
    ("data.batch_size", 16),
    ("data.vocab_size", 1500),
    ("objectives.alignment.report_view", "sentences"),
    ("objectives.alignment.report_sentences", 16),
    ("objectives.alignment.sentence_tokens", 28),
    ("objectives.negation.weight", 0.0),
    ("objectives.alignment.fused_weight", 0.02),
    ("objectives.volume_reconstruction.weight", 0.5),
    ("objectives.report_reconstruction.weight", 0.1),
    ("objectives.matching.weight", 0.05),
    ("objectives.matching.sentence_source", "words"),
    ("objectives.discrimination.weight", 0.01),
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
    ("no-fused-pair", without("alignment.fused_weight")),
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
    steps, variants = {
        "": (300, VARIANTS),
        "long": (700, VARIANTS),
        "long-ends": (700, (VARIANTS[0], VARIANTS[-1])),
    }[arg]
    sweep = ConfigDict()
    sweep.name = "ablation"
    sweep.base = "../quickstart.py:scratch"
    sweep.models = variants
    sweep.patients = (700,)
    sweep.seeds = (0, 1, 2)
    sweep.overrides = ALL
    sweep.length = ("steps", steps)
    sweep.loss = "evaluation/auroc_macro"
    sweep.model_size = "n_active"
    sweep.data_size = "unique_patients"
    return sweep

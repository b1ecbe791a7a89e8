"""Does multi-task training earn what it costs? Contrast, masked volumes, one after the other, and MG-3D, at equal FLOPs.

    mg3d sweep run --config configs/sweeps/multitask.py:scratch --workdir RUN/multitask \\
        --set data.train=RUN/train --set data.valid=RUN/valid
    mg3d sweep compare --workdir RUN/multitask

Every method trains for the same FLOPs, not steps. `mae-then-clip` gives half of them to each stage; the second one starts
from the volume encoder of the first, `mae-half`, of which the table shows nothing. `clip-mae` does both in every step; `-terms`
adds the terms of MG-3D between patients, with small weights and in the form "same_words". The table has zero-shot
classification, retrieval and linear probes of all, 10 % and 1 % of the training patients (small parts within larger ones), each
with its 95 % interval over seeds and the difference to `clip`, paired by seed. Fine-tuning goes on from here:
configs/sweeps/finetune.py.

Arguments, joined by commas: `scratch`, a report encoder that is trained with the rest, or `pretrained`, the frozen one of
configs/quickstart.py; `negation`, which adds that objective to every method that reads reports; `patients=640`, how many
to train on (default 700); `flops=3e13`, another budget; `seeds=5`, more than 3. FLOPs are those of the training steps. A
frozen encoder reads every sentence once, before the first step, which is not in them. With it `mg3d` reads the features of
the sentences too (`model.report_input`) and leaves out the reconstruction of reports: whole reports, masked anew in each step
and passed through the encoder every time, would make a step cost 65 times as much as one of `clip`.
"""

from ml_collections import ConfigDict

from mg3d_jax.config.objectives import SAME_WORDS_FORMS
from mg3d_jax.errors import UserError

FLOPS = {"scratch": 1.65e13, "pretrained": 1.65e13}
TERMS = ("volume_reconstruction", "report_reconstruction", "matching", "discrimination")
BETWEEN_PATIENTS = tuple((f"objectives.{key}", form) for key, form in SAME_WORDS_FORMS.items())
# Small towers of the quickstart; fusion and decoder to match.
SIZES = (
    ("model.fusion.depth", 1),
    ("model.fusion.other_volumes", 1),
    ("model.voxel_decoder.width", 128),
    ("model.voxel_decoder.depth", 1),
    ("model.voxel_decoder.num_heads", 4),
    ("model.matching_dim", 64),
)
EVALUATED = (
    ("training.evaluate_every", 1_000_000),  # at the end
    ("evaluations.probe.every", 1_000_000),
    ("evaluations.probe.online_fractions", (1.0, 10.0)),
)


def terms(alignment: float, fused: float = 0.0, **weights: float) -> tuple:
    """Weights of the objectives; those that are not named are off."""
    named = (("objectives.alignment.weight", alignment), ("objectives.alignment.fused_weight", fused))
    return named + tuple((f"objectives.{name}.weight", weights.get(name, 0.0)) for name in TERMS)


SMALL = {"fused": 0.1, "matching": 0.1, "discrimination": 0.1}
CLIP = terms(1.0)
MAE = (
    *terms(0.0, volume_reconstruction=1.0),
    ("objectives.volume_reconstruction.read_report", False),
    ("objectives.negation.weight", 0.0),
)
MG3D = {
    "scratch": terms(0.1, 1.0, volume_reconstruction=1.0, report_reconstruction=1.0, matching=0.1, discrimination=0.1),
    "pretrained": (
        *terms(0.1, 1.0, volume_reconstruction=1.0, matching=0.1, discrimination=0.1),
        ("model.report_input", "sentences"),
    ),
}
READS = {"scratch": (), "pretrained": (("model.report_input", "sentences"),)}
FROM_MAE = {
    "scratch": (("init_from.take", ("volume_encoder/.*",)),),
    # The frozen report encoder comes along: weights come from one place.
    "pretrained": (
        ("init_from.take", ("volume_encoder/.*", "report_encoder/.*")),
        ("model.report_encoder.pretrained", ""),
    ),
}


def get_config(arg: str = "scratch") -> ConfigDict:
    words = [word for word in arg.split(",") if word]
    numbers = dict(word.split("=", 1) for word in words if "=" in word)
    names = {word for word in words if "=" not in word}
    unknown = names - {"scratch", "pretrained", "negation"} | numbers.keys() - {"patients", "flops", "seeds"}
    if unknown or {"scratch", "pretrained"} <= names:
        raise UserError(
            f"configs/sweeps/multitask.py:{arg}: scratch or pretrained, negation, patients=N, flops=N, seeds=N"
        )
    text = "pretrained" if "pretrained" in names else "scratch"
    sweep = ConfigDict()
    sweep.name = f"multitask-{text}"
    sweep.base = f"../quickstart.py:{text}"
    sweep.models = (
        ("clip", CLIP),
        ("mae", MAE),
        ("mae-half", MAE),
        ("mae-then-clip", CLIP + FROM_MAE[text]),
        ("clip-mae", terms(1.0, volume_reconstruction=1.0) + READS[text]),
        ("mg3d", MG3D[text]),
        ("mg3d-same-words", MG3D[text] + BETWEEN_PATIENTS),
        ("clip-terms", terms(1.0, **SMALL) + BETWEEN_PATIENTS + READS[text]),
        ("clip-mae-terms", terms(1.0, volume_reconstruction=1.0, **SMALL) + BETWEEN_PATIENTS + READS[text]),
    )
    sweep.patients = (int(numbers.get("patients", 700)),)
    sweep.seeds = tuple(range(int(numbers.get("seeds", 3))))
    sweep.overrides = (
        *SIZES,
        *EVALUATED,
        ("objectives.negation.weight", 1.0 if "negation" in names else 0.0),
        # Sentences of an encoder that is being trained drift together until all pairs count as equal.
        ("objectives.matching.sentence_source", "encoder" if text == "pretrained" else "words"),
    )
    sweep.length = ("flops", float(numbers.get("flops", FLOPS[text])))
    sweep.starts_from = (("mae-then-clip", "mae-half"),)
    sweep.shares = (("mae-half", 0.5), ("mae-then-clip", 0.5))
    sweep.loss = "evaluation/auroc_macro"
    sweep.model_size = "n_active"
    sweep.data_size = "unique_patients"
    return sweep

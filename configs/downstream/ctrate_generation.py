"""CT-RATE: writes findings and impression of a scan. A decoder reads the tokens of the volume encoder, trained with it, and
which of the 18 labels a classification head beside it finds (`tasks.generation.findings`).

    mg3d prepare --source ctrate --root CT_RATE --split train --out DATA/train --size 128 128 96 --spacing 2.9 2.9 3.6
    mg3d finetune --config configs/downstream/ctrate_generation.py --init-from RUN --workdir FINETUNED \\
        --config.data.train=DATA/train --config.data.valid=DATA/valid --test DATA/test

BLEU, ROUGE-L, METEOR, CIDEr and label-based clinical efficacy stand beside what texts reach that were written without looking
at the scan, or by a template (docs/generation.md). `:small` is for phantoms (mg3d phantom OUT).
"""

from ml_collections import ConfigDict

from mg3d_jax.interop import finetune


def get_config(arg: str = "") -> ConfigDict:
    config = finetune.begin(
        arg,
        "ctrate_generation",
        volume_size=(128, 128, 96),
        windows=((-1000.0, 1000.0),),
        heads=("report_decoder", "classification_head"),
    )
    finetune.use_report_decoder(config, arg, findings=18)
    config.data.max_tokens = 512  # half of the phantoms' reports, written like CT-RATE's, are longer than 256
    config.evaluations.generation.every = 0
    return config.lock()

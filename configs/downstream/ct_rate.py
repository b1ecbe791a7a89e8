"""CT-RATE, 18 abnormalities: a head on the volume features. Zero-shot and retrieval need no training: `mg3d evaluate`.

    mg3d prepare --source ctrate --root CT_RATE --split train --out DATA/train
    mg3d prepare --source ctrate --root CT_RATE --split valid --out DATA/valid --against DATA/train
    mg3d finetune --config configs/downstream/ct_rate.py --init-from RUN --workdir FINETUNED \\
        --config.data.train=DATA/train --test DATA/valid

`:small` is for phantoms (mg3d phantom OUT; --size 48 48 32 --spacing 7 7 9).
"""

from ml_collections import ConfigDict

from mg3d_jax.interop import finetune


def get_config(arg: str = "") -> ConfigDict:
    return finetune.classification(
        arg, "ct-rate", volume_size=(128, 128, 96), windows=((-1000.0, 1000.0),), num_labels=18
    )

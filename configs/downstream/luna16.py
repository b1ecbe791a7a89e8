"""LUNA16: is a candidate of the lung-nodule challenge a nodule? Patches of 64 mm, one label.

    mg3d prepare --source luna16 --root LUNA16 --split train --out DATA/train
    mg3d prepare --source luna16 --root LUNA16 --split test --out DATA/test --against DATA/train
    mg3d finetune --config configs/downstream/luna16.py --init-from RUN --workdir FINETUNED \\
        --config.data.train=DATA/train --test DATA/test

Nodules are rare among the candidates: with `balance` they count as much as the others. `:small` is for the miniature
(mg3d phantom OUT --layout luna16; --size 48 48 32 --spacing 2 2 3).
"""

from ml_collections import ConfigDict

from mg3d_jax.interop import finetune


def get_config(arg: str = "") -> ConfigDict:
    return finetune.classification(arg, "luna16", volume_size=(64, 64, 64), windows=((-1000.0, 600.0),), num_labels=1)

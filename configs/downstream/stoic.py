"""STOIC 2021: has the patient COVID-19, and is it severe? Two labels, the second known of those who have it.

    for I in 0 1 2 3 4; do mg3d prepare --source stoic --root STOIC --split all --fold $I/5 --fold-file DATA/folds.json \\
        --out DATA/fold$I; done
    mg3d finetune --config configs/downstream/stoic.py --init-from RUN --workdir FINETUNED \\
        --config.data.train="('DATA/fold1','DATA/fold2','DATA/fold3','DATA/fold4')" --test DATA/fold0

`:small` is for the miniature (mg3d phantom OUT --layout stoic; --size 48 48 32).
"""

from ml_collections import ConfigDict

from mg3d_jax.interop import finetune


def get_config(arg: str = "") -> ConfigDict:
    return finetune.classification(arg, "stoic", volume_size=(128, 128, 96), windows=((-1000.0, 1000.0),), num_labels=2)

"""CC-CCII: normal, common pneumonia or COVID-19? Three classes, five folds by patient, as the data set has no official split.

    for I in 0 1 2 3 4; do mg3d prepare --source cc-ccii --root CC_CCII --split all --fold $I/5 --fold-file DATA/folds.json \\
        --out DATA/fold$I; done
    mg3d finetune --config configs/downstream/cc_ccii.py --init-from RUN --workdir FINETUNED \\
        --config.data.train="('DATA/fold1','DATA/fold2','DATA/fold3','DATA/fold4')" --test DATA/fold0

`:small` is for the miniature (mg3d phantom OUT --layout cc-ccii; --size 48 48 32).
"""

from ml_collections import ConfigDict

from mg3d_jax.interop import finetune


def get_config(arg: str = "") -> ConfigDict:
    return finetune.classification(
        arg, "cc-ccii", volume_size=(128, 128, 96), windows=((-1350.0, 150.0),), num_labels=3, kind="multi_class"
    )

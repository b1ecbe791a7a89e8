"""ACDC: right ventricle, myocardium and left ventricle on cine MR, at the ends of diastole and of systole.

    mg3d finetune --config configs/downstream/acdc.py --init-from RUN --workdir FINETUNED \\
        --config.data.train=DATA/train --test DATA/test

Volumes of 160 x 160 x 32 voxels of 1.5 x 1.5 x 5 mm (`mg3d prepare --source acdc`, docs/segmentation.md), crops of 96 x 96 x
32. MR is brought to numbers of the size of HU by the preparation. `:small` is for the miniature (mg3d phantom OUT --layout
acdc; --size 48 48 32 --spacing 4 4 4).
"""

from ml_collections import ConfigDict

from mg3d_jax.interop import segmentation_recipe


def get_config(arg: str = "") -> ConfigDict:
    return segmentation_recipe.begin(
        arg, "acdc", num_classes=4, grid=(160, 160, 32), crop=(96, 96, 32), windows=((-1000.0, 1000.0),)
    ).lock()

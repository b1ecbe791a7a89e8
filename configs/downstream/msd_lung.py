"""MSD Task06: lung tumours on chest CT.

    mg3d prepare --source decathlon --root Task06_Lung --split train --fold 1/5 ... (see docs/segmentation.md)
    mg3d finetune --config configs/downstream/msd_lung.py --init-from RUN --workdir FINETUNED \\
        --config.data.train=DATA/train --test DATA/test

Volumes of 256 x 256 x 192 voxels of 1.5 x 1.5 x 2 mm; crops of 96 along each axis, half of them around a tumour. `:small` is
for the miniature (mg3d phantom OUT --layout msd-lung; --size 48 48 32 --spacing 7 7 8).
"""

from ml_collections import ConfigDict

from mg3d_jax.interop import segmentation_recipe


def get_config(arg: str = "") -> ConfigDict:
    return segmentation_recipe.begin(
        arg, "msd_lung", num_classes=2, grid=(256, 256, 192), crop=(96, 96, 96), windows=((-1000.0, 600.0),)
    ).lock()

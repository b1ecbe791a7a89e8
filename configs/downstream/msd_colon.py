"""MSD Task10: primaries of colon cancer on abdominal CT.

    mg3d finetune --config configs/downstream/msd_colon.py --init-from RUN --workdir FINETUNED \\
        --config.data.train=DATA/train --test DATA/test

Volumes of 256 x 256 x 256 voxels of 1.5 x 1.5 x 2 mm (`mg3d prepare --source decathlon`, docs/segmentation.md); crops of 96
along each axis, half of them around a tumour. `:small` is for the miniature (mg3d phantom OUT --layout msd-colon; --size 48
48 32 --spacing 7 7 8).
"""

from ml_collections import ConfigDict

from mg3d_jax.interop import segmentation_recipe


def get_config(arg: str = "") -> ConfigDict:
    return segmentation_recipe.begin(
        arg, "msd_colon", num_classes=2, grid=(256, 256, 256), crop=(96, 96, 96), windows=((-175.0, 250.0),)
    ).lock()

"""COVID-19-20: lesions of COVID-19 on chest CT.

    mg3d finetune --config configs/downstream/covid_19_20.py --init-from RUN --workdir FINETUNED \\
        --config.data.train=DATA/train --test DATA/test

Volumes of 256 x 256 x 160 voxels of 1.5 x 1.5 x 2 mm (`mg3d prepare --source covid-19-20`, docs/segmentation.md); crops of 96
along each axis, half of them around a lesion. `:small` is for the miniature (mg3d phantom OUT --layout covid-19-20; --size 48
48 32 --spacing 7 7 8).
"""

from ml_collections import ConfigDict

from mg3d_jax.interop import segmentation_recipe


def get_config(arg: str = "") -> ConfigDict:
    return segmentation_recipe.begin(
        arg, "covid_19_20", num_classes=2, grid=(256, 256, 160), crop=(96, 96, 96), windows=((-1000.0, 500.0),)
    ).lock()

"""The encoders by kind. A tower is one file: sizes by name, options, how it is built and what freezing its layers means.

All kinds of volume tower are called alike: `(volume, visible, train=) -> {"tokens", "pooled", ...}`, all kinds of report
tower `(token_ids, token_mask, train=) -> {"tokens", "embeddings"}`. What differs between kinds stays inside them.
"""

from mg3d_jax.models.towers.bert import BERT
from mg3d_jax.models.towers.swin import SWIN
from mg3d_jax.models.towers.vit import VIT
from mg3d_jax.registry import REPORT_TOWERS, VOLUME_TOWERS

VOLUME_TOWERS.register("vit", VIT)
VOLUME_TOWERS.register("swin", SWIN)
REPORT_TOWERS.register("bert", BERT)

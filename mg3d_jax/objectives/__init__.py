"""The objectives of pre-training: one file each, which declares its options, what it needs of the model, and its loss.

`base.Objective` says what a declaration holds, `multitask` sums the losses of those that are on. Losses are pure functions;
nothing here reads a file. Reductions are over the global batch: under `jax.set_mesh` the batch axis may be sharded over
the mesh in any way, and values and gradients stay the same.
"""

from mg3d_jax.objectives.alignment import ALIGNMENT
from mg3d_jax.objectives.discrimination import DISCRIMINATION
from mg3d_jax.objectives.matching import MATCHING
from mg3d_jax.objectives.negation import NEGATION
from mg3d_jax.objectives.report_reconstruction import REPORT_RECONSTRUCTION
from mg3d_jax.objectives.volume_reconstruction import VOLUME_RECONSTRUCTION
from mg3d_jax.registry import OBJECTIVES

OBJECTIVES.register("alignment", ALIGNMENT)
OBJECTIVES.register("volume_reconstruction", VOLUME_RECONSTRUCTION)
OBJECTIVES.register("report_reconstruction", REPORT_RECONSTRUCTION)
OBJECTIVES.register("matching", MATCHING)
OBJECTIVES.register("discrimination", DISCRIMINATION)
OBJECTIVES.register("negation", NEGATION)

"""The objectives of MG-3D as pure functions `(features, masks, settings) -> (loss, metrics)`.

No parameters are hidden here and nothing reads a file. Reductions are over the global batch: under `jax.set_mesh` the
batch axis may be sharded over the mesh in any way, and values and gradients stay the same.
"""

from mg3d_jax.objectives.declared import DECLARED
from mg3d_jax.registry import OBJECTIVES

for _name, _objective in DECLARED.items():
    OBJECTIVES.register(_name, _objective)

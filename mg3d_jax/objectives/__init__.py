"""The objectives of MG-3D as pure functions `(features, masks, settings) -> (loss, metrics)`.

No parameters are hidden here and nothing reads a file. Reductions are over the global batch: under `jax.set_mesh` the
batch axis may be sharded over the mesh in any way, and values and gradients stay the same.
"""

"""Shared by the tests of the objectives: numerical gradients and small fake meshes."""

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

MESH_SHAPES = [(8, 1, 1), (2, 2, 2), (1, 8, 1)]


def numerical_gradient(function, x, step=1e-6):
    """Central differences in float64 of a scalar function of one array."""
    x = np.array(x, np.float64)
    gradient = np.zeros_like(x)
    for index in np.ndindex(*x.shape):
        values = []
        for sign in (1, -1):
            moved = x.copy()
            moved[index] += sign * step
            values.append(function(moved))
        gradient[index] = (values[0] - values[1]) / (2 * step)
    return gradient


def fake_mesh(shape):
    """An Auto mesh of CPU devices with axes data, fsdp, tensor."""
    if jax.device_count() < np.prod(shape):
        pytest.skip(f"needs {np.prod(shape)} devices, has {jax.device_count()}")
    return jax.make_mesh(shape, ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)


def shard_rows(mesh, *arrays):
    """The arrays with axis 0 over the batch axes of the mesh."""
    return jax.device_put(arrays, NamedSharding(mesh, PartitionSpec(("data", "fsdp"))))

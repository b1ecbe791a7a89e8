"""Sliding windows against a brute-force version in float64 and MONAI's, on one device and on a mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mg3d_jax import sharding
from mg3d_jax.errors import UserError
from mg3d_jax.evaluation.sliding_window import SlidingWindow, gaussian, sliding_window

SIZE, FILL = (4, 6, 3), -2.0
RAMP = np.arange(np.prod(SIZE)).reshape(SIZE) % 7 - 3.0  # what a network says depends on where in the window a voxel is


def network(crops):
    """[n, x, y, z] -> [n, x, y, z, 2], in NumPy and in JAX."""
    return jnp.stack([crops * RAMP, crops.mean(axis=(1, 2, 3), keepdims=True) + RAMP + 0 * crops], axis=-1)


def brute_force(volume, overlap):
    """Window by window, voxel weights from the formula of a Gaussian, in float64."""
    lack = [max(w - s, 0) for s, w in zip(volume.shape, SIZE, strict=True)]
    padded = np.pad(volume.astype(np.float64), [(n // 2, n - n // 2) for n in lack], constant_values=FILL)
    places = []
    for side, window in zip(padded.shape, SIZE, strict=True):
        step, of_axis = max(int(window * (1 - overlap)), 1), [0]
        while of_axis[-1] + window < side:
            of_axis.append(min(of_axis[-1] + step, side - window))
        places.append(of_axis)
    total, weight = np.zeros((*padded.shape, 2)), np.zeros(padded.shape)
    for x in places[0]:
        for y in places[1]:
            for z in places[2]:
                at = tuple(slice(s, s + w) for s, w in zip((x, y, z), SIZE, strict=True))
                found = np.asarray(network(padded[at][None]))[0]
                for voxel in np.ndindex(*SIZE):
                    squares = [((v - (w - 1) / 2) / (0.125 * w)) ** 2 for v, w in zip(voxel, SIZE, strict=True)]
                    gauss = max(np.exp(-sum(squares) / 2), 1e-3)
                    place = (x + voxel[0], y + voxel[1], z + voxel[2])
                    total[place] += gauss * found[voxel]
                    weight[place] += gauss
    inside = tuple(slice(n // 2, n // 2 + s) for n, s in zip(lack, volume.shape, strict=True))
    return (total / weight[..., None])[inside]


def run(volumes, overlap=0.5, per_call=4, mesh=None):
    windows = SlidingWindow(SIZE, overlap, per_call)
    program = jax.jit(lambda v: sliding_window(network, v, windows, FILL))
    if mesh is None:
        return np.asarray(program(volumes))
    with sharding.in_mesh(mesh):
        return np.asarray(program(volumes))


# Odd sizes, one slice, smaller than the window along one or all axes, exactly one window.
@pytest.mark.parametrize(
    ("shape", "overlap", "per_call"),
    [((9, 13, 5), 0.5, 4), ((7, 6, 1), 0.25, 3), ((2, 3, 1), 0.5, 1), (SIZE, 0.5, 8), ((5, 20, 4), 0.0, 5)],
)
def test_it_is_the_brute_force_version(shape, overlap, per_call):
    volumes = np.random.default_rng(0).normal(size=(2, *shape)).astype("f")
    found = run(volumes, overlap, per_call)
    assert found.shape == (2, *shape, 2)
    for row in range(2):
        np.testing.assert_allclose(found[row], brute_force(volumes[row], overlap), rtol=1e-4, atol=1e-4)


def test_it_is_monais():
    torch = pytest.importorskip("torch")
    inferers = pytest.importorskip("monai.inferers")
    volumes = np.random.default_rng(0).normal(size=(1, 9, 5, 7)).astype("f")

    def theirs(crops):
        return torch.from_numpy(np.array(network(crops[:, 0].numpy()), np.float32)).permute(0, 4, 1, 2, 3)

    expected = inferers.sliding_window_inference(
        torch.from_numpy(volumes)[:, None], SIZE, 2, theirs, overlap=0.6, mode="gaussian", cval=FILL
    )
    found = run(volumes, 0.6)
    np.testing.assert_allclose(found, expected.permute(0, 2, 3, 4, 1).numpy(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("batch", [1, 8])
def test_on_a_mesh_windows_and_volumes_are_split(batch):
    """The result is that of one device; the windows of a call lie on all eight."""
    mesh = sharding.make_mesh(sharding.MeshConfig())
    volumes = np.random.default_rng(0).normal(size=(batch, 9, 13, 5)).astype("f")
    np.testing.assert_allclose(run(volumes, per_call=8, mesh=mesh), run(volumes), rtol=1e-5, atol=1e-5)
    seen = []

    def watched(crops):
        jax.debug.inspect_array_sharding(crops, callback=seen.append)
        return network(crops)

    placed = jax.device_put(volumes, sharding.batch_sharding(mesh) if batch == 8 else sharding.replicated(mesh))
    with sharding.in_mesh(mesh):
        jax.jit(lambda v: sliding_window(watched, v, SlidingWindow(SIZE, 0.5, 8), FILL)).lower(placed).compile()
    assert seen and all(one.shard_shape((8 * batch, *SIZE))[0] == batch for one in seen)


def test_what_is_impossible():
    with pytest.raises(UserError, match="overlap = 1"):
        SlidingWindow(SIZE, 1.0)
    with pytest.raises(UserError, match="0 windows per call"):
        SlidingWindow(SIZE, 0.5, 0)
    assert gaussian((1, 2, 300)).min() >= 1e-3

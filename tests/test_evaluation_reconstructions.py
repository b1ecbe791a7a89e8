"""Reconstructed slices: what is drawn where, in a radiologist's orientation, whatever the mesh."""

import jax
import numpy as np
import pytest
from support import SPECIAL, random_batch, tiny_config

from mg3d_jax import sharding
from mg3d_jax.evaluation.reconstructions import HIDDEN, Reconstructions, montage, undo_normalization
from mg3d_jax.objectives.volume_reconstruction import normalize_patches
from mg3d_jax.training import state as state_lib

SIDE, MARGIN, TOP = 192, 4, 18  # of a tile, between tiles, above the first


def tile(image, row, column):
    """The voxels of one of the nine tiles of a 16^3 image: [16, 16, 3], the pixel in the middle of each."""
    top, left = TOP + row * (SIDE + MARGIN), MARGIN + column * (SIDE + MARGIN)
    return image[top : top + SIDE, left : left + SIDE][6::12, 6::12]


def on_screen(volume):
    """Middle axial, coronal and sagittal slices [3, 16, 16] of an RAS+ volume, pixel by pixel from the top left."""
    found = np.zeros((3, 16, 16))
    for down in range(16):
        for right in range(16):
            found[0, down, right] = volume[15 - right, 15 - down, 8]  # the patient's right is on the left, anterior up
            found[1, down, right] = volume[15 - right, 8, 15 - down]  # superior up
            found[2, down, right] = volume[8, 15 - right, 15 - down]  # anterior on the left
    return found


BIAS = 0.5


@pytest.fixture(scope="module")
def drawn():
    """A batch and its images, on a mesh, from a decoder that says for every voxel: half a deviation above the mean."""
    config = tiny_config(
        objectives__volume_reconstruction__weight=1.0,
        objectives__volume_reconstruction__normalize_target=True,
        objectives__volume_reconstruction__read_report=False,
        objectives__alignment__weight=0.0,
        model__voxel_decoder__depth=1,
    )
    mesh = sharding.make_mesh(sharding.MeshConfig(data=2, fsdp=2, tensor=2))
    setup = state_lib.build(config, 400, mesh, steps=10)
    params = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), setup.abstract["params"])
    params["voxel_decoder"]["voxels"]["bias"] += BIAS
    batch = random_batch(config)
    batch["volume"] += np.arange(16, dtype=np.int16)[:, None, None] * 20  # patches with means of their own
    batch["patient_id"][:3], batch["valid"][3] = 7, False  # two more scans of the first patient, and a row that pads
    places = jax.device_put(params, setup.shardings["params"])
    return batch, Reconstructions(setup, SPECIAL)(places, sharding.to_global(batch, mesh, 8))


def test_the_slices_show_original_hidden_and_filled_patches(drawn):
    batch, images = drawn
    assert list(images) == ["reconstruction-0", "reconstruction-1", "reconstruction-2"]
    for image, row in zip(images.values(), (0, 4, 5), strict=True):
        volume = np.clip((batch["volume"][row].astype(float) + 1000) / 2000, 0, 1)
        blocks = volume.reshape(2, 8, 2, 8, 2, 8)
        of_patch = blocks.mean(axis=(1, 3, 5)) + BIAS * blocks.std(axis=(1, 3, 5))
        filling = np.clip(of_patch.repeat(8, 0).repeat(8, 1).repeat(8, 2), 0, 1)
        expected, expected_filling = np.round(255 * on_screen(volume)), np.round(255 * on_screen(filling))
        some = 0
        for plane in range(3):
            original, seen, filled = (tile(image, plane, column) for column in range(3))
            letters = np.any(
                [t[..., 0] != t[..., 2] for t in (original, filled)], axis=0
            )  # the edges' names are yellow
            assert letters.sum() < 12
            hidden = (seen == HIDDEN).all(axis=-1)
            share = hidden.reshape(2, 8, 2, 8).mean(axis=(1, 3))
            assert np.abs(share - np.round(share)).max() < 0.1  # whole patches
            np.testing.assert_allclose(original[~letters][:, 0], expected[plane][~letters], atol=1)
            np.testing.assert_array_equal(filled[~(hidden | letters)], original[~(hidden | letters)])
            np.testing.assert_allclose(
                filled[hidden & ~letters][:, 0], expected_filling[plane][hidden & ~letters], atol=1
            )
            some += hidden.sum()
        assert some > 0


def test_normalised_targets_are_turned_back():
    patches = np.random.default_rng(0).random((2, 4, 64)).astype(np.float32)
    patches[0, 0] = 0.25  # a constant patch
    back = undo_normalization(normalize_patches(patches), patches)
    np.testing.assert_allclose(back, patches, atol=1e-5)


def test_slices_have_true_proportions():
    """A volume of 40 x 20 x 10 voxels of 2 x 2 x 8 mm is 80 x 40 x 80 mm: 192 x 96 x 192 pixels."""
    shapes = {"axial": (40, 20), "coronal": (40, 10), "sagittal": (20, 10)}
    columns = ("original", "seen", "reconstructed")
    planes = {
        name: {c: np.ones(shape) for c in columns} | {"hidden": np.zeros(shape, bool)} for name, shape in shapes.items()
    }
    sheet = montage(planes, (2.0, 2.0, 8.0))
    assert sheet.shape == (TOP + (96 + MARGIN) + 2 * (192 + MARGIN), 3 * (192 + MARGIN) + MARGIN, 3)
    assert sheet[TOP + 96 + MARGIN // 2, 100].sum() == 0  # the gap below the axial slices
    bright = (sheet[TOP + 96 + 2 * MARGIN + 192 + 60] == 255).all(axis=-1)  # the sagittal slices, 96 wide
    assert bright.sum() == 3 * 96


def test_no_images_without_volume_reconstruction():
    setup = state_lib.build(tiny_config(), 400, sharding.make_mesh(sharding.MeshConfig(data=8, fsdp=1, tensor=1)), 10)
    assert Reconstructions(setup, SPECIAL)({}, {}) == {}

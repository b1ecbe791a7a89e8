"""A plug-in: towers of one matrix each, for tests that are about saves, signals, processes and files, not about models."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from mg3d_jax.models.towers.base import Sizes, Tower
from mg3d_jax.models.transformer import part
from mg3d_jax.registry import REPORT_TOWERS, VOLUME_TOWERS

CUBE = 8  # voxels along a token of `Cubes`
# "heavy" has a state of several MiB: for tests of what it takes in memory and on disk.
WIDTHS = {"plain": 16, "wider": 32, "wide": 64, "heavy": 256}
PLAIN_SIZES = {name: Sizes(width, 1, 2, width) for name, width in WIDTHS.items()}


class Cubes(nn.Module):
    """A volume tower of one linear layer: almost nothing to trace and to compile."""

    width: int

    @nn.compact
    def __call__(
        self, volume: jax.Array, visible: Any = None, train: bool = False, hidden: bool = False
    ) -> dict[str, jax.Array]:
        batch, *grid, channels = volume.shape
        cut = [length for size in grid for length in (size // CUBE, CUBE)]
        cubes = volume.reshape(batch, *cut, channels).transpose(0, 1, 3, 5, 2, 4, 6, 7)
        kernel = part(nn.initializers.lecun_normal(), (None, "embed"))
        rows = cubes.reshape(batch, -1, CUBE**3 * channels)
        tokens = nn.Dense(self.width, use_bias=False, kernel_init=kernel, name="embed")(rows)
        return {"tokens": tokens, "pooled": tokens.mean(axis=1)}


class Voxels(nn.Module):
    """A segmentation decoder without a layer of its own: windowed HU of a voxel, and means around it.

    A linear head on them finds what is denser than what lies around it.
    """

    @nn.compact
    def __call__(self, volume: jax.Array, encoded: dict[str, jax.Array]) -> jax.Array:
        means = []
        for side in (3, 9):
            mean = volume
            for window in ((side, 1, 1), (1, side, 1), (1, 1, side)):
                mean = nn.avg_pool(mean, window, padding="SAME")
            means.append(mean)
        near, far = means
        return jnp.concatenate([volume, far, nn.relu(volume - far), nn.relu(near - far - 0.2)], axis=-1)


class Words(nn.Module):
    """A report tower that looks words up and does nothing else."""

    vocab_size: int
    width: int

    @nn.compact
    def __call__(self, token_ids: jax.Array, token_mask: jax.Array, train: bool = False) -> dict[str, jax.Array]:
        made = part(nn.initializers.normal(1.0), (None, "embed"))
        tokens = jnp.take(self.param("word_embedding", made, (self.vocab_size, self.width)), token_ids, axis=0)
        return {"tokens": tokens, "embeddings": tokens}


@dataclass(frozen=True)
class NoOptions:
    """Nothing beyond what every tower has."""


CUBES = Tower(
    options=NoOptions,
    presets=PLAIN_SIZES,
    build=lambda model, channels, backend="xla": Cubes(model.volume_encoder.sizes.width),
    module=Cubes,
    frozen=lambda preset, layers: [("embed/.*", 0.0)],
    token_cell=lambda encoder: (CUBE,) * 3,
    segmenter=lambda model: Voxels(),
)
WORDS = Tower(
    options=NoOptions,
    presets=PLAIN_SIZES,
    build=lambda model, vocab_size, backend="xla": Words(vocab_size, model.report_encoder.sizes.width),
    module=Words,
    frozen=lambda preset, layers: [("word_embedding", 0.0)],
)

VOLUME_TOWERS.register("cubes", CUBES)
REPORT_TOWERS.register("words", WORDS)

"""What goes with an export beside the weights of a run."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mg3d_jax.errors import UserError
from mg3d_jax.interop.export_format import Probe

DTYPES = ("float32", "bf16")
SHARD_SIZE = "5GB"
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMG])B", re.IGNORECASE)


@dataclass(frozen=True)
class Extras:
    """Of the format hf, but for `dtype`.

    Args:
        probe: a linear head on the embeddings.
        zero_shot: the content of `zero_shot.json`: `classes` (label -> `present` and `absent`, lists of sentences), `prompts`,
            `scoring`, `protocol`.
        evaluated: the `evaluation.json` of the exported step; None where it was not evaluated.
        trained: `summary.json` of the run; None where it did not end.
        dtype: of the stored weights, one of `DTYPES`.
        shard_size: above which the weights lie in several files, e.g. "5GB".
    """

    probe: Probe | None = None
    zero_shot: Mapping[str, Any] | None = None
    evaluated: Mapping[str, Any] | None = None
    trained: Mapping[str, Any] | None = None
    dtype: str = "float32"
    shard_size: str = SHARD_SIZE

    def check(self, form: str, projection_dim: int) -> None:
        """`UserError` where something does not go with the format, or with embeddings of `projection_dim` numbers."""
        if self.probe is not None and form != "hf":
            raise UserError(f"a probe reads the embedding, which the format {form!r} does not have: export it with hf")
        if self.probe is not None and self.probe.weight.shape[1] != projection_dim:
            raise UserError(
                f"the probe is for embeddings of {self.probe.weight.shape[1]} numbers, the run's have {projection_dim}: give "
                "the probe that was fitted to this run"
            )
        if self.dtype != "float32" and form != "hf":
            raise UserError(f"--dtype {self.dtype} is for the format hf; {form!r} is written in float32")


def shard_bytes(size: str) -> int:
    """`"5GB" -> 5_000_000_000`. `UserError` where it is no size."""
    found = _SIZE.fullmatch(size.strip())
    count = int(float(found[1]) * 1000 ** (" KMG".index(found[2].upper()))) if found else 0
    if not count:
        raise UserError(f"--shard-size {size}: give a number with KB, MB or GB, e.g. {SHARD_SIZE}")
    return count

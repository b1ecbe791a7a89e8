"""Settings of JAX that change what is computed: a shell or another project has left them, and no message would say so."""

from __future__ import annotations

import logging
from collections.abc import MutableMapping

from mg3d_jax.errors import UserError

logger = logging.getLogger(__name__)
# Environment variable -> what this package computes with: float32, and random numbers that every mesh and resume repeats.
# Each is an attribute of `jax.config` of the same name in small letters.
SETTINGS = {
    "JAX_ENABLE_X64": False,
    "JAX_NUMPY_DTYPE_PROMOTION": "standard",
    "JAX_NUMPY_RANK_PROMOTION": "allow",
    "JAX_DEFAULT_PRNG_IMPL": "threefry2x32",
    "JAX_THREEFRY_PARTITIONABLE": True,
}


def ignore(environment: MutableMapping[str, str]) -> None:
    """Takes these settings out of the environment and says so. Before JAX is imported, for this process and what it starts."""
    for name, ours in SETTINGS.items():
        value = environment.pop(name, None)
        if value is not None and value.lower() not in {
            str(ours).lower(),
            str(int(ours)) if isinstance(ours, bool) else "",
        }:
            logger.warning("%s=%s of the environment is not used: it would change what is computed", name, value)


def check() -> None:
    """`UserError` where one of them is set otherwise: by a program that uses this package as a library."""
    import jax

    for name, ours in SETTINGS.items():
        value = getattr(jax.config, name.lower(), ours)
        if value != ours:
            raise UserError(
                f"jax.config.{name.lower()} is {value!r}, and models and checkpoints of this package need {ours!r}: unset "
                f"{name}, or jax.config.update({name.lower()!r}, {ours!r})"
            )

"""What a run ran on: software and devices, without names of hosts, users or folders, so that a report can be passed on."""

from __future__ import annotations

import platform
import sys
from collections import Counter
from importlib import metadata
from typing import Any

import jax

from mg3d_jax import version

PACKAGES = (
    "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "ml_collections", "tokenizers", "nibabel",
)  # fmt: skip


def environment_facts() -> dict[str, Any]:
    """JSON for `environment.json`: `mg3d_jax` and `commit` (of this code), `python`, `platform`, `packages` (versions, None
    where not installed), `backend`, `devices` (count by kind, of the whole run), `local_devices`, `processes`. Starts
    JAX's backend."""
    return {
        **version.code(),
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}, {sys.implementation.name}",
        "packages": {name: _version(name) for name in PACKAGES},
        "backend": jax.default_backend(),
        "devices": dict(Counter(device.device_kind for device in jax.devices())),
        "local_devices": jax.local_device_count(),
        "processes": jax.process_count(),
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None

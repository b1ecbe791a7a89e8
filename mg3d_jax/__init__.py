"""MG-3D: multi-grained 3D CT and report pre-training in JAX.

    run = mg3d_jax.load("runs/quickstart/run")
    run.zero_shot("scan.nii.gz")

`load` opens a trained run (`Run`), `prepare_data` prepares scans and reports, `Trainer` trains. `mg3d --help` lists the
commands.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mg3d_jax.api import Run, load, prepare_data
    from mg3d_jax.trainer import Trainer

__version__ = "0.2.0.dev0"
__all__ = ["Run", "Trainer", "load", "prepare_data"]


def __getattr__(name: str) -> Any:
    # On first use, so that `import mg3d_jax` and `mg3d --help` do not import JAX.
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = import_module("mg3d_jax.trainer" if name == "Trainer" else "mg3d_jax.api")
    return getattr(module, name)

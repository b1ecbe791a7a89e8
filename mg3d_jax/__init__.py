"""MG-3D: multi-grained 3D CT and report pre-training in JAX.

    run = mg3d_jax.load("runs/quickstart/run")
    run.zero_shot("scan.nii.gz")

`load` opens a trained run (`Run`), `prepare_data` prepares scans and reports, `Trainer` trains. `mg3d --help` lists the
commands.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mg3d_jax.api import Run, Trainer, load, prepare_data

__version__ = "0.2.0.dev0"
__all__ = ["Run", "Trainer", "load", "prepare_data"]


def __getattr__(name: str) -> Any:
    # On first use, so that `import mg3d_jax` and `mg3d --help` do not import JAX.
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from mg3d_jax import api

    return getattr(api, name)

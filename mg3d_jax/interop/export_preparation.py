"""The preparation that an exported folder carries: the modules of this package that read a scan, with imports of one another.

They are copies, so what a receiver computes is what `mg3d prepare` computed. transformers loads code from one flat folder and
follows `from .name import`; it wants every package that stands in an import outside of `try`, so the optional ones go inside.
"""

from __future__ import annotations

import importlib.util
import re
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

import mg3d_jax

ROOT = Path(mg3d_jax.__file__).parent
TEMPLATES = Path(__file__).parent / "torch_template"
PROCESSORS = ("image_processing_mg3d", "processing_mg3d")
_OURS = re.compile(r"^from mg3d_jax(?:\.([\w.]+))? import ", re.MULTILINE)
_INDENTED = re.compile(r"^( +)(import \S+(?: as \w+)?|from [^.\s]\S* import [^(\n]+)$", re.MULTILINE)


def copied_name(module: str) -> str:
    """`prepare.geometry` -> `mg3d_geometry`."""
    return f"mg3d_{module.rsplit('.', 1)[-1]}"


def write(folder: Path) -> list[str]:
    """Writes the processors and all that they import. Returns the names of the files."""
    todo = {name: TEMPLATES / f"{name}.py" for name in PROCESSORS}
    done: dict[str, str] = {}
    while todo:
        name, path = todo.popitem()
        text = path.read_text()
        for module in _OURS.findall(text):
            if copied_name(module) not in done:
                todo[copied_name(module)] = ROOT.joinpath(*module.split(".")).with_suffix(".py")
        done[name] = _standing_alone(text)
    for name, text in done.items():
        (folder / f"{name}.py").write_text(text)
    return sorted(f"{name}.py" for name in done)


def _standing_alone(text: str) -> str:
    text = _OURS.sub(lambda found: f"from .{copied_name(found[1])} import ", text)
    return _INDENTED.sub(r"\1try:\n\1    \2\n\1except ImportError:\n\1    raise", text)


def load(folder: Path, name: str = "image_processing_mg3d") -> ModuleType:
    """A written module, as a receiver would import it."""
    package = f"mg3d_exported_{abs(hash(str(folder)))}"
    spec = ModuleSpec(package, None, is_package=True)
    spec.submodule_search_locations = [str(folder)]
    sys.modules[package] = importlib.util.module_from_spec(spec)
    try:
        return importlib.import_module(f"{package}.{name}")
    finally:
        for key in [key for key in sys.modules if key.split(".")[0] == package]:
            del sys.modules[key]

"""The code that an exported folder carries: the modules of `torch_template`, and those of this package that read scans and
reports, with imports of one another.

They are copies, so what a receiver computes is what `mg3d prepare` computed. transformers loads code from one flat folder and
follows `from .name import`; it wants every package that stands in an import outside of `try`, so the optional ones go inside.
"""

from __future__ import annotations

import importlib.util
import re
import sys
from collections.abc import Iterable, Mapping
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import mg3d_jax
from mg3d_jax.batch import AIR_HU, HIGHEST_HU
from mg3d_jax.interop.export_run import Run
from mg3d_jax.prepare.geometry import STRAIGHTEN_DEGREES

ROOT = Path(mg3d_jax.__file__).parent
TEMPLATES = Path(__file__).parent / "torch_template"
IMAGE_PROCESSOR = "image_processing_mg3d"
MODULES = (IMAGE_PROCESSOR, "processing_mg3d", "modeling_mg3d", "pipeline_mg3d")  # with all that they import
_OURS = re.compile(r"^from mg3d_jax(?:\.([\w.]+))? import ", re.MULTILINE)
_BESIDE = re.compile(r"^ *from \.(\w+) import ", re.MULTILINE)
_INDENTED = re.compile(r"^( +)(import \S+(?: as \w+)?|from [^.\s]\S* import [^(\n]+)$", re.MULTILINE)


def copied_name(module: str) -> str:
    """`prepare.geometry` -> `mg3d_geometry`."""
    return f"mg3d_{module.rsplit('.', 1)[-1]}"


def write(folder: Path, modules: Iterable[str] = MODULES) -> None:
    """Writes these modules of the template and all that they import."""
    todo = {name: TEMPLATES / f"{name}.py" for name in modules}
    texts: dict[str, str] = {}
    needs: dict[str, set[str]] = {}
    while todo:
        name, path = todo.popitem()
        text = path.read_text()
        found = {beside: TEMPLATES / f"{beside}.py" for beside in _BESIDE.findall(text)}
        for module in _OURS.findall(text):
            found[copied_name(module)] = ROOT.joinpath(*module.split(".")).with_suffix(".py")
        texts[name], needs[name] = _standing_alone(text), set(found)
        todo |= {one: place for one, place in found.items() if one not in texts}
    for name, text in texts.items():
        (folder / f"{name}.py").write_text(text + _named_for_copying(name, needs))


def _named_for_copying(name: str, needs: Mapping[str, set[str]]) -> str:
    """Lines that name what a module needs by way of others: of a local folder, transformers before 5 copies only the files
    whose names stand in the one that it loads."""
    found, todo = set(needs[name]), [*needs[name]]
    while todo:
        new = needs[todo.pop()] - found
        found |= new
        todo += new
    lines = [f"    from .{one} import *\n" for one in sorted(found - needs[name] - {name})]
    return "".join(["\n\nif False:  # never run: says which files belong to this one\n", *lines]) if lines else ""


def _standing_alone(text: str) -> str:
    text = _OURS.sub(lambda found: f"from .{copied_name(found[1])} import ", text)
    return _INDENTED.sub(r"\1try:\n\1    \2\n\1except ImportError:\n\1    raise", text)


def load(folder: Path) -> ModuleType:
    """The written module of the image processor, as a receiver would import it."""
    package = f"mg3d_exported_{abs(hash(str(folder)))}"
    spec = ModuleSpec(package, None, is_package=True)
    spec.submodule_search_locations = [str(folder)]
    sys.modules[package] = importlib.util.module_from_spec(spec)
    try:
        return importlib.import_module(f"{package}.{IMAGE_PROCESSOR}")
    finally:
        for key in [key for key in sys.modules if key.split(".")[0] == package]:
            del sys.modules[key]


_LOADED_BY = {
    "image_processor_type": "MG3DImageProcessor",
    "processor_class": "MG3DProcessor",
    "auto_map": {
        "AutoImageProcessor": f"{IMAGE_PROCESSOR}.MG3DImageProcessor",
        "AutoProcessor": "processing_mg3d.MG3DProcessor",
    },
}
PLACEMENTS = {
    "center": "the centre of the volume on the centre of the grid; cropped or padded on all sides alike",
    "body": "the centre of the body's bounding box on the centre of the grid; cropped or padded around it",
    "lung": "the centre of the lungs' bounding box on the centre of the grid; cropped or padded around it",
    "fraction": "a fixed share of each axis (`fraction`) about the centre of the volume, resized to the grid",
}


def tokenizer_config(run: Run, content: dict[str, Any]) -> dict[str, Any]:
    """`tokenizer_config.json` of the run's, with the length at which texts were cut in training."""
    return content | {"model_max_length": run.config.text_tokens()}


def processor_config(run: Run) -> dict[str, Any]:
    """`processor_config.json`: the arguments of the exported processor of texts and scans."""
    return {
        "processor_class": "MG3DProcessor",
        "auto_map": {"AutoProcessor": "processing_mg3d.MG3DProcessor"},
        "max_tokens": run.config.text_tokens(),
        "max_sentences": run.config.data.max_sentences,
    }


def preprocessor_config(run: Run, *, processor: bool = True) -> dict[str, Any]:
    """`preprocessor_config.json`: what the weights expect of a volume, so that nobody has to guess; the first keys are the
    arguments of the exported image processor.

    Args:
        processor: the folder has that image processor.
    """
    grid, config = run.grid, run.config
    fraction = grid.policy == "fraction"
    return {
        "size_voxels": list(config.model.volume_size),
        "spacing_mm": None if fraction else [float(mm) for mm in grid.spacing],
        "policy": grid.policy,
        "fraction": list(grid.fraction) if fraction else None,
        "modality": run.modality,
        "clip_hu": list(run.clip or (AIR_HU, HIGHEST_HU)),
        **(_LOADED_BY if processor else {}),
        "input": "Hounsfield units, int16 or float, array [X, Y, Z]; rescale slope and intercept applied exactly once",
        "orientation": "RAS",
        "axes": "x to the patient's right, y anterior, z superior",
        "placement": PLACEMENTS[grid.policy],
        "oblique_scans": f"askew by more than {STRAIGHTEN_DEGREES:g} degrees: turned onto the scanner's axes",
        "resampling": "area average along an axis that shrinks, linear along one that grows",
        "pad_value_hu": AIR_HU,
        "windows_hu": [list(window) for window in config.data.windows],
        "window_output": [0.0, 1.0],
        "windowing": "done by encode_volume; one channel per window" if processor else "one channel per window",
    }

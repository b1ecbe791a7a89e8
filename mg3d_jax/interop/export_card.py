"""The README (model card) of an export: how to use it, what it expects, how it was checked, and whose data is in it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mg3d_jax import __version__
from mg3d_jax.interop.export_preparation import PLACEMENTS
from mg3d_jax.interop.export_run import Run
from mg3d_jax.models.towers.vit.monai import stream_scale
from mg3d_jax.prepare.geometry import STRAIGHTEN_DEGREES

_LICENCES = {
    "ctrate": "The training data lay in CT-RATE's layout. If it was CT-RATE: that data set is gated and under "
    "CC-BY-NC-SA-4.0, so these weights may only be used for non-commercial purposes, with attribution, and passed on "
    "under the same licence. If it was phantoms (`mg3d phantom`), there is no such condition.",
    "ctrg": "The training data lay in CTRG-Chest's layout. That data set states no licence: ask its authors before you "
    "pass these weights on.",
}
_UNKNOWN = (
    "Nothing is known about the licence of the training data: ask whoever trained the model before you pass it on."
)

_TANH_GELU = """\
for block in {vit}.blocks:  # the GELU that the model was trained with
    block.mlp.fn = torch.nn.GELU(approximate="tanh")
"""


_MONAI_ENCODES = """\
tokens, hidden = vit(volume)  # volume: [B, {channels}, X, Y, Z], windowed to 0..1
```

On phantom CT, loaded like this, the normalised tokens differ from the JAX model's by at most {difference:.1e}.
"""
_MONAI_SEGMENTS = """\
from monai.inferers import sliding_window_inference

with torch.no_grad():  # volume: [B, {channels}, X, Y, Z] of any size, windowed to 0..1, on the spacing below
    logits = sliding_window_inference(volume, {size}, 4, network, overlap=0.5, mode="gaussian")
classes = logits.argmax(1)  # {names}
```

On phantom CT, loaded like this, the shares of the classes differ from the JAX model's by at most {difference:.1e}.
Outside of a scan MONAI pads with 0, which is the lowest value of each window, as air here.
"""


def licence_note(run: Run) -> str:
    """What the origin of the data means for the weights."""
    return "\n".join(_LICENCES.get(source, _UNKNOWN) for source in run.sources or ("",))


def _modality(run: Run) -> str:
    """A row for models of MR: their numbers are no HU."""
    if run.modality == "CT":
        return ""
    return "\n| intensities | MR: percentiles 0.5 and 99.5 of each volume become -1000 and 1000; there are no HU |"


def _geometry(run: Run) -> str:
    size = run.config.model.volume_size
    where = "" if run.grid.policy == "fraction" else f" of {' x '.join(f'{mm:g}' for mm in run.spacing)} mm"
    windows = ", ".join(f"{low:g}..{high:g} HU" for low, high in run.config.data.windows)
    return f"""\
| what | value |
|---|---|
| orientation | RAS+: array axes [X, Y, Z], x to the patient's right, y anterior, z superior |
| grid | {" x ".join(map(str, size))} voxels{where}; placed: {PLACEMENTS[run.grid.policy]} |
| values | Hounsfield units; rescale slope and intercept applied exactly once |
| padding | -1024 HU (air), never 0 HU |
| windows | {windows}, scaled to 0..1 |{_modality(run)}"""


def _heads(arguments: Mapping[str, Any]) -> str:
    """How the heads that are in the export are called; "" where there is none."""
    texts = {
        "head": ("classification_logits", "The head that the encoder was trained with"),
        "probe": ("probe_logits", "A linear probe, fitted to the embeddings of this model"),
    }
    found = []
    for name, (method, what) in texts.items():
        if classes := arguments.get(f"{name}_classes"):
            several = arguments[f"{name}_kind"] == "multi_class"
            turned = "softmax(-1)" if several else "sigmoid()"
            found.append(
                f"{what} scores {len(classes)} classes (`model.config.{name}_classes`): `model.{method}(hu[None]).{turned}`."
            )
    if classes := arguments.get("segmentation_classes"):
        found.append(
            f"It segments {len(classes)} classes (`model.config.segmentation_classes`: {', '.join(classes)}): "
            "`model.segment_scan(np.asarray(image.dataobj), image.affine)` gives the class of each voxel of a whole scan, by "
            "overlapping windows; `model.segment` the logits on volumes of the spacing below, `model.segmentation_logits` "
            "those of one window, for `monai.inferers.sliding_window_inference` too. One window has the grid below."
        )
    if arguments.get("decoder_depth"):
        found.append(
            "It writes reports: `model.write_reports(hu[None], tokenizer)`; `model.report_logits` are those of the next token."
        )
    return "".join(f"\n{text}\n" for text in found)


def _code(arguments: Mapping[str, Any]) -> str:
    if arguments.get("segmentation_classes") or arguments.get("decoder_depth"):
        return "two files, `modeling_mg3d.py` and `modeling_mg3d_tasks.py`"
    return "one file, `modeling_mg3d.py`"


def _untrained(run: Run) -> str:
    """That nothing compared volumes with reports, where that is so: embeddings are then no use."""
    compared = any(one.weight > 0 for one in run.config.objectives.values())
    if compared or run.config.tasks["vocabulary"].weight > 0:
        return ""
    return (
        "\nThis run was fine-tuned for its task: nothing compared volumes with reports, so that embeddings of the two need not "
        "fit together any more, and zero-shot probabilities mean little.\n"
    )


def model_card(
    run: Run, differences: dict[str, float], left_out: list[str], arguments: Mapping[str, Any] | None = None
) -> str:
    """README.md of the Hugging Face format. `arguments` are those of `MG3DConfig`."""
    compared = "\n".join(f"| {name} | {value:.1e} |" for name, value in differences.items())
    not_here = f"\nNot exported, because only pre-training needs it: {', '.join(left_out)}.\n" if left_out else ""
    return f"""\
---
library_name: transformers
license: other
tags: [medical, ct, radiology, vision-language, zero-shot-classification]
---

# {run.config.name}: chest CT and report encoders (MG-3D)

Step {run.step} of a run of mg3d_jax {__version__}. Needs torch, transformers and safetensors, and for scans nibabel, scipy and
isal (DICOM: pydicom); JAX is not needed.

```python
import torch
from transformers import AutoImageProcessor, AutoModel, AutoTokenizer

folder = "."  # this folder
model = AutoModel.from_pretrained(folder, trust_remote_code=True)
processor = AutoImageProcessor.from_pretrained(folder, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)

# A NIfTI file, a folder with the slices of a DICOM series, or (array, affine); decides what its numbers mean in HU.
inputs = processor("chest.nii.gz")
with torch.no_grad():
    volume = model.encode_volume(inputs["volume"])  # [1, {run.config.model.projection_dim}], normalised; does the windowing
prompts = model.encode_texts(tokenizer, [["Emphysema is present."], ["Emphysema is not present."]])
probability = (model.logit_scale.exp() * volume @ prompts.T).softmax(-1)[0, 0]
```

`python verify_mg3d.py` in this folder tells whether it is whole and computes here what it computed where it was made.
`model.encode_texts` takes texts as lists of sentences; `model.tokenize` and `model.encode_report` are its two halves.
`model.encode_volume(hu, return_tokens=True)` also gives the patch features. The model is {_code(arguments or {})}; the
other `.py` files are those that brought the training volumes to the grid. `AutoProcessor` takes `images` and `text`.
{_heads(arguments or {})}{_untrained(run)}
## What it expects

{_geometry(run)}

The same is in `preprocessor_config.json`. Area averaging where an axis shrinks, linear interpolation where it grows; scans that
are askew by more than {STRAIGHTEN_DEGREES:g} degrees are turned. The image processor gave exactly the voxels of the preparation
on phantom files before this folder was written.
{not_here}
## Checked

Phantom CT through JAX and through this PyTorch module, both float32; largest absolute difference:

| embedding | difference |
|---|---|
{compared}

## Licence and data

{licence_note(run)}

Research software: not a medical device, not for clinical decisions.
"""


def monai_card(run: Run, network: str, classes: list[str], difference: float, tanh_gelu: bool) -> str:
    """README.md of the MONAI format. `network` is the class, "ViT", "UNETR" or "SwinUNETR"; `classes` of the latter two."""
    variable = "vit" if network == "ViT" else "network"
    gelu = _TANH_GELU.format(vit=variable if network == "ViT" else f"{variable}.vit") if tanh_gelu else ""
    use = _MONAI_SEGMENTS if classes else _MONAI_ENCODES
    channels, size = len(run.config.data.windows), tuple(run.config.model.volume_size)
    text = use.format(channels=channels, size=size, names=", ".join(classes), difference=difference)
    if network == "ViT":
        text += (
            f"`hidden` is {stream_scale(run.config.model):.4g} times that of the JAX model, to make up for the other epsilon\n"
            "of MONAI's norms. Pooling and projection are not part of MONAI's ViT.\n"
        )
    what = "volume encoder" if network == "ViT" else "segmentation"
    return f"""\
# {run.config.name}: {what} for MONAI's {network}

Step {run.step} of a run of mg3d_jax {__version__}.

```python
import json, torch
from monai.networks.nets import {network}
from safetensors.torch import load_file

{variable} = {network}(**json.load(open("config.json"))["arguments"]).eval()
{variable}.load_state_dict(load_file("model.safetensors"), strict=True)
{gelu}{text}
## What it expects

{_geometry(run)}

## Licence and data

{licence_note(run)}
"""

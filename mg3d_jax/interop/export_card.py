"""The README (model card) of an export: how to use it, what it expects, how it was checked, and whose data is in it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mg3d_jax import __version__
from mg3d_jax.interop.export_front_matter import evaluated_data, front_matter, licence_note, measured
from mg3d_jax.interop.export_options import Extras
from mg3d_jax.interop.export_preparation import PLACEMENTS
from mg3d_jax.interop.export_run import Run
from mg3d_jax.models.towers.base import MonaiNetwork
from mg3d_jax.models.towers.vit.monai import UNETR_DEPTH, UNETR_PATCH, stream_scale
from mg3d_jax.prepare.geometry import STRAIGHTEN_DEGREES

EXAMPLE = "example.nii.gz"  # which every folder has

_TANH_GELU = """\
for block in {vit}.blocks:  # the GELU that the model was trained with
    block.mlp.fn = torch.nn.GELU(approximate="tanh")
"""


_MONAI_ENCODES = """\
tokens, hidden = vit(volume)  # volume: [B, {channels}, X, Y, Z], windowed to 0..1
```

On phantom CT, loaded like this, the normalised tokens differ from the JAX model's by at most {difference:.1e}.
"""
_MONAI_STAGES = """\
stages = network.swinViT(volume, normalize=True)  # volume: [B, {channels}, X, Y, Z], windowed to 0..1; five stages
logits = network(volume)  # the decoder is fresh: fine-tune it
```

On phantom CT, loaded like this, the last stage differs from the JAX model's tokens by at most {difference:.1e}.
"""
_IN_UNETR = """
The encoder of a UNETR, whose decoder is fresh:

```python
from monai.networks.nets import UNETR

arguments = {name: about["arguments"][name] for name in ("in_channels", "img_size", "hidden_size", "mlp_dim", "num_heads")}
unetr = UNETR(**arguments, out_channels=2, feature_size=16, proj_type="conv", qkv_bias=True)
unetr.vit.load_state_dict(load_file("model.safetensors"), strict=True)
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
            "It writes reports: `model.write_reports(hu[None])`; `model.report_logits` are those of the next token."
        )
    return "".join(f"\n{text}\n" for text in found)


def _untrained(run: Run) -> str:
    """That nothing compared volumes with reports, where that is so: embeddings are then no use."""
    compared = any(one.weight > 0 for one in run.config.objectives.values())
    if compared or run.config.tasks["vocabulary"].weight > 0:
        return ""
    return (
        "\nThis run was fine-tuned for its task: nothing compared volumes with reports, so that embeddings of the two need not "
        "fit together any more, and zero-shot probabilities mean little.\n"
    )


def _data(run: Run, trained: Mapping[str, Any] | None) -> str:
    """What the model was trained on, as far as the run says it."""
    layouts = ", ".join(run.sources) or "an unknown layout"
    if not trained:
        return f"Data in the layout of {layouts}. How much that was is not known: the run has no summary."
    return (
        f"{trained['unique_records']:,} volumes of {trained['unique_patients']:,} patients, in the layout of {layouts}; "
        f"{trained['samples_seen']:,} samples in {trained['step']:,} steps."
    )


def _results(evaluated: Mapping[str, Any] | None) -> str:
    """A table of what `mg3d evaluate` found; "" where the exported step was not evaluated."""
    if not evaluated or not (rows := measured(evaluated)):
        return "The exported step was not evaluated: `mg3d evaluate` before `mg3d export` puts its results here.\n"
    lines = [f"On {evaluated_data(evaluated)}:\n", "| metric | value | 95 % interval |", "|---|---|---|"]
    for name, value, interval, _ in rows:
        within = f"{interval[0]:.3f} to {interval[1]:.3f}" if interval else ""
        lines.append(f"| {name} | {value:.3f} | {within} |")
    protocols = dict.fromkeys(protocol for *_, protocol in rows if protocol)
    return "\n".join([*lines, "", *(f"- {protocol}" for protocol in protocols)]) + "\n"


def model_card(
    run: Run,
    differences: dict[str, float],
    left_out: list[str],
    arguments: Mapping[str, Any] | None = None,
    extras: Extras = Extras(),  # noqa: B008
) -> str:
    """README.md of the Hugging Face format. `arguments` are those of `MG3DConfig`."""
    compared = "\n".join(f"| {name} | {value:.1e} |" for name, value in differences.items())
    not_here = f"\nNot exported, because only pre-training needs it: {', '.join(left_out)}.\n" if left_out else ""
    asked, width = extras.zero_shot or {}, run.config.model.projection_dim
    protocol = f"Protocol: {asked['protocol']}. Labels and sentences stand in `zero_shot.json`.\n" if asked else ""
    stored = ", rounded to bfloat16, of which both had the rounded values" if extras.dtype == "bf16" else ""
    return f"""\
{front_matter(run, extras.evaluated)}

# {run.config.name}: chest CT and report encoders (MG-3D)

Step {run.step} of a run of mg3d_jax {__version__}. `pip install -r requirements.txt`; JAX is not needed.

## What is in a scan

```python
from transformers import AutoModel

model = AutoModel.from_pretrained(".", trust_remote_code=True)  # this folder
probabilities = model.zero_shot("{EXAMPLE}")  # label -> probability that it is present
```

A NIfTI file, a folder with the slices of a DICOM series, or `(array, affine)`; what its numbers mean in HU is decided by
evidence. Any other finding: `model.zero_shot(scan, {{"Cyst": ("There is a cyst.", "There is no cyst.")}})`. The same as a
pipeline: `pipeline("zero-shot-image-classification", model=".", trust_remote_code=True)`. {protocol}
## Embeddings

```python
import torch
from transformers import AutoModel, AutoProcessor

model = AutoModel.from_pretrained(".", trust_remote_code=True)
processor = AutoProcessor.from_pretrained(".", trust_remote_code=True)
inputs = processor(images="{EXAMPLE}", text=["Emphysema is present.", "Emphysema is not present."])
with torch.no_grad():
    output = model(**inputs)  # logits_per_image [1, 2], image_embeds [1, {width}], text_embeds [2, {width}]
    volume = model.get_image_features(inputs["pixel_values"])  # of length 1; the model does the windowing
    texts = model.encode_texts(["A long report. Each sentence counts.", "There is no cyst."])  # of any length
    patches = output.vision_model_output.last_hidden_state  # [1, patches, {run.config.model.volume_encoder.sizes.width}]
```

DICOM, where `series` is a folder with the slices of one series:

```python
from transformers import AutoImageProcessor

volume = AutoImageProcessor.from_pretrained(".", trust_remote_code=True)("series")["pixel_values"]  # HU [1, X, Y, Z]
```

## Fine-tuning

```python
import torch
from transformers import AutoModel, AutoImageProcessor

model = AutoModel.from_pretrained(".", trust_remote_code=True).float().train()
model.gradient_checkpointing_enable()
head = torch.nn.Linear(model.config.hidden_size, 2)
hu = AutoImageProcessor.from_pretrained(".", trust_remote_code=True)("{EXAMPLE}")["pixel_values"]
optimizer = torch.optim.AdamW([*model.volume_encoder.parameters(), *head.parameters()], lr=1e-5)
loss = torch.nn.functional.cross_entropy(head(model.volume_encoder(model.window(hu))[1]), torch.tensor([1]))
loss.backward()
optimizer.step()
model.save_pretrained("tuned")
```

`model(..., return_loss=True)` is the contrastive loss of pairs. `mg3d import hf` and `init_from` read a tuned folder back.
One tower alone, a quarter of the memory:

```python
from transformers import AutoModel

vision = AutoModel.from_pretrained(".", trust_remote_code=True, tower="vision")  # or "text"
```

`python verify_mg3d.py` in this folder tells whether it is whole and computes here what it computed where it was made.
{_heads(arguments or {})}{_untrained(run)}
## What it expects

{_geometry(run)}

The same is in `preprocessor_config.json`. Area averaging where an axis shrinks, linear interpolation where it grows; scans that
are askew by more than {STRAIGHTEN_DEGREES:g} degrees are turned. The image processor gave exactly the voxels of the preparation
on phantom files before this folder was written.
{not_here}
## Training data and results

{_data(run, extras.trained)}

{_results(extras.evaluated)}
## Checked

Phantom CT through JAX and through this PyTorch module, both float32{stored}; largest absolute difference:

| embedding | difference |
|---|---|
{compared}

## Intended use and limits

Research on chest CT: features for other models, search among scans and reports, first looks at findings. Not for diagnosis,
triage or any decision about a patient: it is no medical device, and nobody has measured it on the patients whom you see.

- It knows chests as its training data show them: other regions, children, contrast phases and scanners that these lack may give
  confident nonsense. It does not notice that a scan is not of a chest.
- A score is a comparison of two sentences, not a calibrated probability; thresholds need labelled scans of your own.
- It sees {" x ".join(map(str, run.config.model.volume_size))} voxels: what is smaller than a few of them is not there for it.
- Reports state what was asked for and seen: their habits and their biases are in the embeddings.

## Licence

{licence_note(run)}
"""


def monai_card(run: Run, network: MonaiNetwork, classes: list[str], difference: float, tanh_gelu: bool) -> str:
    """README.md of the MONAI format. `classes` are those of a network that segments."""
    name, part = network.name, network.part
    variable = "vit" if name == "ViT" else "network"
    gelu = _TANH_GELU.format(vit=variable if name == "ViT" else f"{variable}.vit") if tanh_gelu else ""
    use = _MONAI_SEGMENTS if classes else _MONAI_STAGES if part else _MONAI_ENCODES
    model, channels = run.config.model, len(run.config.data.windows)
    size = tuple(model.volume_size)
    text = use.format(channels=channels, size=size, names=", ".join(classes), difference=difference)
    if name == "ViT":
        text += (
            f"`hidden` is {stream_scale(model):.4g} times that of the JAX model, to make up for the other epsilon\n"
            "of MONAI's norms. Pooling and projection are not part of MONAI's ViT.\n"
        )
        if (
            tuple(model.volume_encoder.options.patch_size) == UNETR_PATCH
            and model.volume_encoder.sizes.depth == UNETR_DEPTH
        ):
            text += _IN_UNETR + (_TANH_GELU.format(vit="unetr.vit") if tanh_gelu else "") + "```\n"
    what = "segmentation" if classes else "volume encoder"
    return f"""\
# {run.config.name}: {what} for MONAI's {name}

Step {run.step} of a run of mg3d_jax {__version__}.

```python
import json, torch
from monai.networks.nets import {name}
from safetensors.torch import load_file

about = json.load(open("config.json"))
{variable} = {name}(**about["arguments"]).eval()
{variable}{"." + part if part else ""}.load_state_dict(load_file("model.safetensors"), strict=True)
{gelu}{text}
## What it expects

{_geometry(run)}

## Licence and data

{licence_note(run)}
"""

"""A run's weights for PyTorch and Hugging Face users, or its ViT for MONAI users.

The export is checked before anything reaches its place: phantom CT and reports go through the Linen model and through the
PyTorch one, both in float32, and the embeddings must agree.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np

from mg3d_jax import config as config_lib
from mg3d_jax.data.records import file_digest
from mg3d_jax.errors import UserError
from mg3d_jax.files import read_json, write_json
from mg3d_jax.interop import export_card, export_format, export_monai, export_preparation
from mg3d_jax.interop.export_format import Probe
from mg3d_jax.interop.export_run import Inputs, Run, phantom_inputs, phantom_scans, reference_features
from mg3d_jax.models.towers.base import MonaiNetwork

TOLERANCE = 1e-4  # on l2-normalised embeddings and on normalised tokens, float32
# On the shares of a voxel's classes: where the coarsest level of a decoder has few voxels, its instance norms make the last
# bits of the features before them larger.
SHARES_TOLERANCE = 1e-3
SHARES = "shares of the classes of voxels"
FILES = "files.txt"  # what an export wrote, by which a later one into the same folder takes its place
TEMPLATE = Path(__file__).parent / "torch_template" / "modeling_mg3d.py"
VERIFY_TEMPLATE = TEMPLATE.with_name("verify_mg3d.py")
TASKS_TEMPLATE = TEMPLATE.with_name("modeling_mg3d_tasks.py")


def write_hugging_face(run: Run, folder: Path, probe: Probe | None = None) -> list[str]:
    """Writes what `AutoModel.from_pretrained(folder, trust_remote_code=True)` loads. Returns lines to print."""
    from safetensors.numpy import save_file

    from mg3d_jax.interop.torch_template.modeling_mg3d import SETTINGS, vocabulary_hash

    params, left_out = export_format.split_params(run.params)
    arguments = export_format.torch_config(run.config, params, run.spacing, run.grid.policy)
    arguments["vocabulary_hash"] = vocabulary_hash(run.tokenizer.tokenizer.get_vocab())
    arguments |= export_format.head_arguments(run.config, params, run.label_names)
    tasks = export_format.task_arguments(run.config, params, run.mask_names)
    arguments |= tasks | (probe.arguments() if probe else {})
    content = export_format.hugging_face_config(
        arguments, step=run.step, config_hash=config_lib.config_hash(run.config), tasks=bool(tasks)
    )
    write_json(folder / "config.json", content)
    write_json(folder / "preprocessor_config.json", export_preparation.preprocessor_config(run))
    state = export_format.torch_state(params, run.config) | (probe.state() if probe else {})
    save_file(state, folder / "model.safetensors", metadata={"format": "pt", SETTINGS: json.dumps(arguments)})
    for template in (TEMPLATE, TASKS_TEMPLATE) if tasks else (TEMPLATE,):
        shutil.copyfile(template, folder / template.name)
    export_preparation.write(folder)
    for file in sorted(run.tokenizer_folder.iterdir()):
        shutil.copyfile(file, folder / file.name)
    inputs = phantom_inputs(run.model_grid)
    check_processor(run, folder, inputs)
    differences = compare(run, folder, inputs, probe)
    write_verification(run, folder, inputs)
    (folder / "README.md").write_text(export_card.model_card(run, differences, left_out, arguments))
    lines = [f"{name}: JAX and PyTorch differ by at most {value:.1e}" for name, value in differences.items()]
    if left_out:
        lines.append(f"not exported, needed in pre-training only: {', '.join(left_out)}")
    return lines


def check_processor(run: Run, folder: Path, inputs: Inputs) -> None:
    """`UserError` where the exported image processor does not bring phantom files to exactly the voxels that a preparation
    with the run's settings gives."""
    module = export_preparation.load(folder)
    logging.getLogger(module.__package__).setLevel(logging.ERROR)  # one phantom is askew on purpose
    processor = module.MG3DImageProcessor.from_dict(read_json(folder / "preprocessor_config.json"))
    low, high = processor.clip_hu
    for number, ((content, _), expected) in enumerate(zip(phantom_scans(), inputs.volumes, strict=True)):
        path = folder / "scan.nii.gz"
        path.write_bytes(content)
        found = processor(str(path), return_tensors="np")["volume"][0]
        path.unlink()
        if (differs := found != np.clip(expected, low, high)).any():
            raise UserError(
                f"nothing was exported: on phantom {number} the exported preprocessing gives {differs.mean():.1%} other voxels "
                f"than a preparation by {run.grid}: report the run's config.json and the manifest.json of its data"
            )


def write_verification(run: Run, folder: Path, inputs: Inputs) -> None:
    """`example.nii.gz` and `verification.json`: what the Linen model makes of the first phantom, for `verify_mg3d.py`."""
    content, sentences = phantom_scans()[0]
    (folder / "example.nii.gz").write_bytes(content)
    shutil.copyfile(VERIFY_TEMPLATE, folder / VERIFY_TEMPLATE.name)
    texts = [[sentence] for sentence in sentences[:2]]
    expected = reference_features(run, np.repeat(inputs.volumes[:1], len(texts), 0), texts)
    files = sorted(file for file in folder.iterdir() if file.is_file())
    told = {
        "sha256": {file.name: file_digest(file) for file in files},
        "texts": texts,
        "volume_embedding": expected["volume_embedding"][:1].tolist(),
        "text_embeddings": expected["report_embedding"].tolist(),
        "tolerance": TOLERANCE,
    }
    write_json(folder / "verification.json", told)


def compare(run: Run, folder: Path, inputs: Inputs, probe: Probe | None = None) -> dict[str, float]:
    """Largest absolute difference of the volume and report embeddings, and of the probabilities of heads, between the Linen
    model and the exported one.

    Raises `UserError` above `TOLERANCE`, or where the exported tokenizer gives other ids.
    """
    torch = torch_module()
    from transformers import PreTrainedTokenizerFast
    from transformers.utils import logging as transformers_logging

    from mg3d_jax.interop.torch_template.modeling_mg3d_tasks import MG3DTaskModel

    transformers_logging.disable_progress_bar()
    model = MG3DTaskModel.from_pretrained(folder).eval()  # without decoders it is an `MG3DModel`
    # Views of as many sentences as training showed, so that no token limit cuts the comparison short.
    size = model.config.report_sentences or model.config.max_sentences
    reports = [report[:size] for report in inputs.reports] + [report[-1:] for report in inputs.reports]
    expected = reference_features(run, inputs.volumes, reports)
    text = model.tokenize(PreTrainedTokenizerFast.from_pretrained(folder), reports)
    ids = np.stack([run.tokenizer(report)["token_ids"] for report in reports])
    if not np.array_equal(text["input_ids"].numpy(), ids):
        raise UserError(
            "the exported tokenizer gives other token ids than the run's: this tokenizer cannot be exported"
        )
    volumes = torch.from_numpy(inputs.volumes)
    with torch.no_grad():
        found = {
            "volume_embedding": model.encode_volume(volumes).numpy(),
            "report_embedding": model.encode_report(**text).numpy(),
        }
        if probe:
            name = "probability of the probe"
            expected[name] = _sigmoid(expected["volume_embedding"] @ probe.weight.T + probe.bias)
            found[name] = _sigmoid(model.probe_logits(volumes).numpy())
        if export_format.HEAD in run.params:
            name, head = "probability of the trained head", run.params[export_format.HEAD]
            expected[name] = _sigmoid(expected["volume_pooled"] @ head["kernel"] + head["bias"])
            found[name] = _sigmoid(model.classification_logits(volumes).numpy())
        if model.config.segmentation_classes:
            expected[SHARES] = _softmax(expected["segmentation_logits"])
            found[SHARES] = _softmax(np.moveaxis(model.segmentation_logits(volumes).numpy(), 1, -1))
        if model.config.decoder_depth:
            name, ids = "probability of the next token", text["input_ids"][: len(volumes), : run.config.data.max_tokens]
            expected[name] = _softmax(expected["next_token_logits"])
            found[name] = _softmax(model.report_logits(volumes, ids[:, :-1]).numpy())
    return check_close(expected, found)


def _sigmoid(logits: np.ndarray) -> np.ndarray:
    """Logits have no scale of their own; a difference of probabilities means the same for every head."""
    return 1 / (1 + np.exp(-logits))


def _softmax(logits: np.ndarray) -> np.ndarray:
    shares = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return shares / shares.sum(axis=-1, keepdims=True)


def check_close(expected: dict[str, np.ndarray], found: dict[str, np.ndarray]) -> dict[str, float]:
    """The largest absolute difference of each array of `found`; `UserError` where one is above `TOLERANCE` (of `SHARES`:
    `SHARES_TOLERANCE`) or NaN."""
    differences = {name: float(np.abs(expected[name] - array).max()) for name, array in found.items()}
    for name, value in differences.items():
        tolerance = SHARES_TOLERANCE if name == SHARES else TOLERANCE
        if not value <= tolerance:
            raise UserError(
                f"nothing was exported: {name} of the JAX and the PyTorch model differ by {value:.2e} on phantom "
                f"volumes, more than {tolerance:.0e}. Check that this version of mg3d trained the run, and report the "
                "run's config.json: the two models must be the same function"
            )
    return differences


def write_monai(run: Run, folder: Path) -> list[str]:
    """Writes the ViT as a state dict of MONAI's `ViT`, or a model that segments as one of its `UNETR` or `SwinUNETR`; the ViT
    alone where UNETR has no place for its decoder. Returns lines to print."""
    inputs = phantom_inputs(run.model_grid)
    expected = reference_features(run, inputs.volumes, inputs.reports)
    network, lines = _monai_network(run)
    found = export_monai.write(run, folder, network, inputs.volumes)
    if network.name == "ViT":
        name, expected, classes = "volume_tokens", {"volume_tokens": expected["volume_tokens"]}, []
    else:
        name, classes = SHARES, export_format.mask_classes(run.config, run.mask_names)
        expected, found = {name: _softmax(expected["segmentation_logits"])}, _softmax(np.moveaxis(found, 1, -1))
        about = read_json(folder / "config.json") | {"classes": classes}
        write_json(folder / "config.json", about)
    difference = check_close(expected, {name: found})[name]
    write_json(folder / "preprocessor_config.json", export_preparation.preprocessor_config(run))
    tanh = export_monai.needs_tanh_gelu(run)
    (folder / "README.md").write_text(export_card.monai_card(run, network.name, classes, difference, tanh))
    lines.append(f"{network.name}: {name}: JAX and MONAI differ by at most {difference:.1e}")
    if tanh:
        lines.append("set MONAI's GELU to the tanh form, which the model was trained with: README.md has the two lines")
    return lines


def _monai_network(run: Run) -> tuple[MonaiNetwork, list[str]]:
    """What of MONAI's a run is, and lines on what of it that leaves out."""
    model, tower = run.config.model, run.config.model.volume_encoder.tower
    if export_format.SEGMENTATION_HEAD not in run.params or tower.to_monai_network is None:
        return export_monai.vit_network(run), []
    try:
        return tower.to_monai_network(run.params, model, len(run.config.data.windows)), []
    except UserError as error:
        if tower.to_torch is None:
            raise
        return export_monai.vit_network(run), [f"the encoder alone: {error}. The format hf has the decoder, too"]


FORMATS: dict[str, Callable[..., list[str]]] = {"hf": write_hugging_face, "monai": write_monai}


def export(run: Run, out: Path, form: str = "hf", probe: Probe | None = None) -> list[str]:
    """Writes and checks an export next to `out`, then moves it there: a failed export leaves `out` as it was.

    Args:
        probe: a linear head on the embeddings that goes with the "hf" format.
    """
    if probe is not None and form != "hf":
        raise UserError(f"a probe reads the embedding, which the format {form!r} does not have: export it with hf")
    if probe is not None and probe.weight.shape[1] != run.config.model.projection_dim:
        raise UserError(
            f"the probe is for embeddings of {probe.weight.shape[1]} numbers, the run's have "
            f"{run.config.model.projection_dim}: give the probe that was fitted to this run"
        )
    whole = form == "monai" and export_format.SEGMENTATION_HEAD in run.params
    for name in export_format.TOWERS if form == "hf" else export_format.TOWERS[:1]:  # MONAI's networks read no reports
        encoder = getattr(run.config.model, name)
        if encoder.tower.to_torch is None and not (whole and encoder.tower.to_monai_network is not None):
            hint = f"{encoder.tower.torch_hint}. " if encoder.tower.torch_hint else ""
            raise UserError(
                f"this run's {name} is a {encoder.kind}, which cannot be exported: {hint}Its checkpoints can be used here, "
                "e.g. by `mg3d evaluate` and `mg3d attend`"
            )
    check_out(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as name:
        lines = FORMATS[form](run, Path(name), **({"probe": probe} if probe else {}))
        out.mkdir(exist_ok=True)
        made = sorted(Path(name).iterdir())
        for file in made:
            file.chmod(0o644)  # libraries make some for their owner alone
        (Path(name) / FILES).write_text("".join(f"{file.name}\n" for file in made))
        earlier = (out / FILES).read_text().split("\n") if (out / FILES).exists() else []
        for file in [*made, Path(name) / FILES]:
            os.replace(file, out / file.name)
        for old in {part for part in earlier if part} - {file.name for file in made}:
            (out / Path(old).name).unlink(missing_ok=True)  # or a receiver would load what belongs to other weights
    return lines


def check_out(out: Path) -> None:
    """`UserError` where `out` holds something else than an earlier export."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    try:
        ours = export_format.MARKER in json.loads((out / "config.json").read_text())
    except (OSError, ValueError):
        ours = False
    if not ours:
        raise UserError(f"--out {out} exists and is not an earlier export: name a new folder")


def torch_module() -> ModuleType:
    """torch, which only exports need."""
    try:
        import torch
    except ImportError as error:
        raise UserError(
            "an export is checked with PyTorch, which is not installed here: pip install torch (without a GPU, the CPU build: "
            "pytorch.org says how)"
        ) from error
    return torch

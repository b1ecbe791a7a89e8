"""What an export must show before it is handed out: the same numbers as the Linen model, and the voxels of `mg3d prepare`."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from mg3d_jax.data.records import file_digest
from mg3d_jax.errors import UserError
from mg3d_jax.files import read_json, write_json
from mg3d_jax.interop import export_format, export_preparation
from mg3d_jax.interop.export_format import Probe
from mg3d_jax.interop.export_run import Inputs, Run, phantom_scans, reference_features

TOLERANCE = 1e-4  # on l2-normalised embeddings and on normalised tokens, float32
# On the shares of a voxel's classes: where the coarsest level of a decoder has few voxels, its instance norms make the last
# bits of the features before them larger.
SHARES_TOLERANCE = 1e-3
SHARES = "shares of the classes of voxels"
VERIFY_TEMPLATE = Path(__file__).parent / "torch_template" / "verify_mg3d.py"


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


def sigmoid(logits: np.ndarray) -> np.ndarray:
    """Logits have no scale of their own; a difference of probabilities means the same for every head."""
    return 1 / (1 + np.exp(-logits))


def softmax(logits: np.ndarray) -> np.ndarray:
    """The same, over the last axis."""
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
        found = processor(str(path), return_tensors="np")["pixel_values"][0]
        path.unlink()
        if (differs := found != np.clip(expected, low, high)).any():
            raise UserError(
                f"nothing was exported: on phantom {number} the exported preprocessing gives {differs.mean():.1%} other voxels "
                f"than a preparation by {run.grid}: report the run's config.json and the manifest.json of its data"
            )


def compare(
    run: Run, folder: Path, inputs: Inputs, probe: Probe | None = None
) -> tuple[dict[str, float], dict[str, Any]]:
    """The Linen model and the exported one on phantoms, both in float32.

    Returns:
        The largest absolute difference of the volume and report embeddings, and of the probabilities of heads; and what
        `verify_mg3d.py` expects of the first phantom.

    Raises:
        UserError: a difference is above `TOLERANCE`, or the exported tokenizer gives other ids.
    """
    torch = torch_module()
    from transformers import PreTrainedTokenizerFast
    from transformers.utils import logging as transformers_logging

    from mg3d_jax.interop.torch_template.modeling_mg3d_tasks import MG3DTaskModel

    transformers_logging.disable_progress_bar()
    model = MG3DTaskModel.from_pretrained(folder).float().eval()  # without decoders it is an `MG3DModel`
    # Views of as many sentences as training showed, so that no token limit cuts the comparison short.
    size = model.config.report_sentences or model.config.max_sentences
    examples = [[sentence] for sentence in inputs.reports[0][:2]]
    reports = [*(report[:size] for report in inputs.reports), *(report[-1:] for report in inputs.reports), *examples]
    expected = reference_features(run, inputs.volumes, reports)
    with _quiet():
        text = model.tokenize(reports, PreTrainedTokenizerFast.from_pretrained(folder))
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
            expected[name] = sigmoid(expected["volume_embedding"] @ probe.weight.T + probe.bias)
            found[name] = sigmoid(model.probe_logits(volumes).numpy())
        if export_format.HEAD in run.params:
            name = "probability of the trained head"
            expected[name] = sigmoid(expected["classification_logits"])
            found[name] = sigmoid(model.classification_logits(volumes).numpy())
        if model.config.segmentation_classes:
            expected[SHARES] = softmax(expected["segmentation_logits"])
            found[SHARES] = softmax(np.moveaxis(model.segmentation_logits(volumes).numpy(), 1, -1))
        if model.config.decoder_depth:
            name, ids = "probability of the next token", text["input_ids"][: len(volumes), : run.config.data.max_tokens]
            expected[name] = softmax(expected["next_token_logits"])
            findings = torch.tensor(expected["findings"]) if "findings" in expected else None
            found[name] = softmax(model.report_logits(volumes, ids[:, :-1], findings).numpy())
        verification = {
            "texts": examples,
            "volume_embedding": expected["volume_embedding"][:1].tolist(),
            "text_embeddings": expected["report_embedding"][-len(examples) :].tolist(),
            "tolerance": TOLERANCE,
        }
        if (folder / "zero_shot.json").exists():
            verification["zero_shot"] = model.zero_shot(volumes[:1])[0]
    return check_close(expected, found), verification


class _quiet:
    """Without the messages of cut texts: phantoms' reports are cut on purpose."""

    def __enter__(self) -> None:
        logging.disable(logging.WARNING)

    def __exit__(self, *_: object) -> None:
        logging.disable(logging.NOTSET)


def write_verification(folder: Path, verification: dict[str, Any]) -> None:
    """`verification.json` with the digest of every file, and `verify_mg3d.py`. `compare` gives what is expected."""
    shutil.copyfile(VERIFY_TEMPLATE, folder / VERIFY_TEMPLATE.name)
    files = sorted(file for file in folder.iterdir() if file.is_file())
    write_json(
        folder / "verification.json", {"sha256": {file.name: file_digest(file) for file in files}} | verification
    )


def write_example(folder: Path) -> None:
    """`example.nii.gz`, a synthetic chest, which `verify_mg3d.py` and the snippets of the card read."""
    (folder / "example.nii.gz").write_bytes(phantom_scans()[0][0])

"""The Python API: what it embeds is what `mg3d evaluate` embeds, and what cannot be used is said in words."""

import subprocess
import sys

import nibabel as nib
import numpy as np
import pytest
from support import OLD, ROOT

import mg3d_jax
from mg3d_jax.commands.main import main
from mg3d_jax.data.abnormalities import ABNORMALITIES
from mg3d_jax.data.pipeline import PreparedData
from mg3d_jax.data.tokens import ReportTokenizer
from mg3d_jax.errors import UserError
from mg3d_jax.evaluation import scoring
from mg3d_jax.evaluation.base import chosen
from mg3d_jax.evaluation.embed import DataEmbedder, Embedder

SIZE, SPACING = ("16", "16", "16"), ("20", "18", "20")


@pytest.fixture(scope="module")
def run(old_run):
    return mg3d_jax.load(old_run)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Phantoms with their prepared folder: `{"files": [NIfTI], "folder": prepared}`, in the order of the records."""
    folder = tmp_path_factory.mktemp("phantoms")
    assert main(["phantom", str(folder / "raw"), "--patients", "2", "--valid", "2", "--seed", "0"]) == 0
    command = ["prepare", "--source", "ctrate", "--root", str(folder / "raw"), "--split", "valid"]
    command += ["--out", str(folder / "valid"), "--size", *SIZE, "--spacing", *SPACING, "--qa-samples", "0"]
    assert main(command) == 0
    files = {path.name: path for path in (folder / "raw").rglob("*.nii.gz")}
    prepared = PreparedData((str(folder / "valid"),))
    return {
        "files": [files[record.name] for record in map(prepared.read, range(len(prepared)))],
        "folder": folder / "valid",
    }


@pytest.fixture(scope="module")
def embedded(run, data):
    """The data set as `mg3d evaluate` embeds it."""
    restored, options = run.restored, run.config.data
    tokenizer = ReportTokenizer(restored.tokenizer, options.max_tokens, options.max_sentences)
    embedder = Embedder(restored.setup, tokenizer, 4)
    return DataEmbedder(embedder, PreparedData((str(data["folder"]),)), chosen())(restored.params)


def test_a_volume_is_embedded_as_by_evaluate(run, data, embedded):
    for file, expected in zip(data["files"], embedded["zero_shot"].volumes, strict=True):
        found = run.embed_volume(file)
        assert found.dtype == np.float32 and np.linalg.norm(found) == pytest.approx(1, abs=1e-5)
        np.testing.assert_allclose(found, expected, atol=2e-6)


def test_voxels_with_an_affine_are_the_same_scan(run, data):
    image = nib.load(data["files"][0])
    voxels = np.asarray(image.dataobj)
    np.testing.assert_allclose(run.embed_volume((voxels, image.affine)), run.embed_volume(data["files"][0]), atol=1e-6)


def test_reports_and_prompts_are_embedded_as_by_evaluate(run, data, embedded):
    prepared = PreparedData((str(data["folder"]),))
    records = {record.report_id: record.sentences for record in map(prepared.read, range(len(prepared)))}
    found = run.embed_texts([list(sentences) for sentences in records.values()])
    reports = embedded["retrieval"].reports
    closest = np.abs(found[:, None] - reports[None]).max(axis=-1).min(axis=1)
    assert found.shape == (len(records), reports.shape[1]) and closest.max() < 2e-6
    for side, words in enumerate(("present", "not present")):
        prompts = run.embed_texts([f"{name} is {words}." for name in ABNORMALITIES])
        np.testing.assert_allclose(prompts, embedded["zero_shot"].prompts["ct_clip"].embeddings[side], atol=2e-6)


def test_zero_shot_has_the_protocol_of_evaluate(run, data, embedded):
    one = embedded["zero_shot"]
    expected = scoring.probabilities(one.volumes, one.prompts["ct_clip"].embeddings, one.logit_scale)
    found = run.zero_shot(data["files"][1])
    assert tuple(found) == ABNORMALITIES
    np.testing.assert_allclose(list(found.values()), expected[1], atol=1e-5)
    two = run.zero_shot(data["files"][1], ["Emphysema", "a fracture"])
    assert two["Emphysema"] == pytest.approx(found["Emphysema"], abs=1e-6) and 0 < two["a fracture"] < 1


def test_a_sentence_looks_at_a_scan_in_its_own_space(run, data, tmp_path):
    found = run.attend(data["files"][0], "right pleural effusion.")
    image = nib.load(data["files"][0])
    assert found.map.shape == image.shape and found.method in ("attention", "occlusion")
    found.save(tmp_path / "map.nii.gz")
    np.testing.assert_allclose(nib.load(tmp_path / "map.nii.gz").affine, image.affine, rtol=1e-6)


def test_evaluate_gives_the_document_of_the_command(run):
    found = run.evaluate([OLD / "valid"], only=["retrieval"])
    assert found["step"] == run.step == 3 and found["retrieval"]["report_to_volume/gallery"] == 6


def test_attributes(run):
    assert run.config.model.volume_size == (16, 16, 16)
    assert run.tokenizer(["no nodule."])["token_ids"].ndim == 1


def test_what_cannot_be_used_is_said(run, data, tmp_path):
    with pytest.raises(UserError, match=r"nothing\.nii\.gz: cannot be used \(no such file\)"):
        run.embed_volume(tmp_path / "nothing.nii.gz")
    with pytest.raises(UserError, match=r"is not a training run: it has no config\.json"):
        mg3d_jax.load(tmp_path)
    for empty in ([], "a sentence, not a list"):
        with pytest.raises(UserError, match="a list of at least one text"):
            run.embed_texts(empty)
    with pytest.raises(UserError, match="text 1 is ' '"):
        run.embed_texts(["no nodule.", " "])
    image = nib.load(data["files"][0])
    voxels = np.full(image.shape, np.nan, np.float32)
    with pytest.raises(UserError, match=r"the array given: cannot be used .*NaN or infinite"):
        run.embed_volume((voxels, image.affine))
    with pytest.raises(UserError, match="three axes"):
        run.embed_volume((voxels[0], image.affine))
    with pytest.raises(UserError, match="policy 'middle': choose one of"):
        mg3d_jax.load(run.restored.folder, policy="middle").embed_volume(data["files"][0])


def test_a_long_text_is_not_cut_in_silence(run, caplog):
    run.embed_texts(["nodule " * 500])
    assert "longer than the" in caplog.text


def test_importing_the_package_is_light():
    code = "import sys, mg3d_jax; assert not {'jax', 'numpy', 'grain'} & sys.modules.keys(); mg3d_jax.load"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, timeout=120)

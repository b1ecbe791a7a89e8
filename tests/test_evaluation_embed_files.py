"""`mg3d embed`: what the file holds, that its evaluation is that of the run, and that a kill changes no byte of it."""

import json
import shutil

import numpy as np
import pytest
from support import OLD

import mg3d_jax
from mg3d_jax.commands.main import main
from mg3d_jax.config import config_hash
from mg3d_jax.data.pipeline import PreparedData
from mg3d_jax.evaluation import embed_files, embedding_files
from mg3d_jax.evaluation.base import chosen
from mg3d_jax.evaluation.embed import Embedder
from mg3d_jax.phantom import patients as phantoms
from mg3d_jax.phantom.dataset import nifti_bytes
from mg3d_jax.training.restore import restore_run


def embed(run, out, *words):
    return main(["embed", "--workdir", str(run), "--data", str(OLD / "valid"), "--out", str(out), *words])


@pytest.fixture(scope="module")
def whole(old_run, tmp_path_factory):
    """The file of an undisturbed command."""
    out = tmp_path_factory.mktemp("whole") / "valid.npz"
    assert embed(old_run, out, "--sentences") == 0
    assert list(out.parent.iterdir()) == [out]
    return out


def test_the_file_holds_the_data_with_its_ids(old_run, whole):
    found, data = embedding_files.load(whole), PreparedData((str(OLD / "valid"),))
    records = [data.read(index) for index in range(len(data))]
    for name, field in (("volume_ids", "name"), ("patient_ids", "patient"), ("scan_ids", "scan")):
        assert found[name].tolist() == [getattr(record, field) for record in records]
    np.testing.assert_array_equal(found["labels"], [record.labels for record in records])
    assert found["label_names"].tolist() == list(data.label_names)
    reports = {record.report_id: record.sentences for record in records}
    assert found["report_ids"].tolist() == list(reports)
    assert found["volume_report_ids"].tolist() == [record.report_id for record in records]
    sentences = [(report, sentence) for report, of in reports.items() for sentence in of]
    pairs = zip(found["sentence_report_ids"].tolist(), found["sentence_texts"].tolist(), strict=True)
    assert list(pairs) == sentences
    loaded = mg3d_jax.load(old_run)
    np.testing.assert_allclose(found["sentence_embeddings"][5], loaded.embed_texts([sentences[5][1]])[0], atol=2e-6)
    texts = loaded.embed_texts([list(text) for text in reports.values()])
    np.testing.assert_allclose(found["report_embeddings"], texts, atol=2e-6)
    about = json.loads(str(found["about"]))
    assert about["step"] == loaded.step and about["config_hash"] == config_hash(loaded.restored.config)


def test_its_evaluation_is_that_of_the_run(old_run, whole, tmp_path):
    of_run = ["--workdir", str(old_run), "--data", str(OLD / "valid")]
    assert main(["evaluate", *of_run, "--out", str(tmp_path / "run")]) == 0
    assert main(["evaluate", "--embeddings", str(whole), "--out", str(tmp_path / "file")]) == 0
    of_run, of_file = (json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("run", "file"))
    shared = of_run.keys() & of_file.keys()
    assert {name for name in of_run if name.startswith(("retrieval/", "volume_retrieval/"))} <= shared
    for name in shared:
        assert of_file[name] == pytest.approx(of_run[name], abs=1e-6, nan_ok=True), name
    a, b = (json.loads((tmp_path / name / "evaluation.json").read_text()) for name in ("run", "file"))
    assert a["zero_shot"]["auroc_macro"] == pytest.approx(b["zero_shot"]["auroc_macro"], abs=1e-6)


def test_a_command_that_is_killed_goes_on_and_gives_the_same_bytes(old_run, tmp_path, monkeypatch, capsys):
    """14 records in batches of 8, each a part."""
    monkeypatch.setattr(embed_files, "PART_VOLUMES", 1)
    monkeypatch.setattr(embed_files, "PART_TEXTS", 4)
    embedded, out = [], tmp_path / "both.npz"
    volumes, texts = Embedder.volume_batches, Embedder.texts

    def volumes_until_killed(self, *args, start=0, **kwargs):
        for number, rows in enumerate(volumes(self, *args, start=start, **kwargs)):
            if state["killed"] == "volumes" and number == 1:
                raise KeyboardInterrupt
            embedded.append(start + number)
            yield rows

    def texts_until_killed(self, *args):
        if state["killed"] == "texts" and len(list(tmp_path.glob("both.npz.parts/reports-*"))) == 1:
            raise KeyboardInterrupt
        return texts(self, *args)

    monkeypatch.setattr(Embedder, "volume_batches", volumes_until_killed)
    monkeypatch.setattr(Embedder, "texts", texts_until_killed)
    state = {"killed": "volumes"}
    restored, folders = restore_run(old_run), [str(OLD / split) for split in ("train", "valid")]

    def work(path):
        return embed_files.embed_data(restored, folders, path, chosen()["zero_shot"], sentences=True, batch_size=8)

    for killed, done in (("volumes", [0]), ("texts", [0, 1])):
        state["killed"] = killed
        with pytest.raises(KeyboardInterrupt):
            work(out)
        assert not out.exists() and embedded == done
    state["killed"] = ""
    done = work(out)
    assert (done.volumes, done.resumed) == (0, 14) and embedded == [0, 1]  # none twice
    assert "14 of 14 volumes are there already" in capsys.readouterr().err
    work(tmp_path / "straight.npz")
    assert (tmp_path / "straight.npz").read_bytes() == out.read_bytes() and not list(tmp_path.glob("*.parts"))


def test_parts_of_another_command_are_thrown_away(old_run, whole, tmp_path, capsys):
    parts = embed_files.Parts(tmp_path / "valid.npz.parts", {"run": "another"})
    parts.write("volumes", 0, {"embedding": np.zeros((6, 3)), "record_index": np.arange(6)})
    assert embed(old_run, tmp_path / "valid.npz") == 0
    said = capsys.readouterr()
    assert "thrown away" in said.err and "6 volumes and" in said.out and "volumes per second" in said.out
    found = embedding_files.load(tmp_path / "valid.npz")
    np.testing.assert_array_equal(found["volume_embeddings"], embedding_files.load(whole)["volume_embeddings"])


def test_scans_from_outside(old_run, tmp_path, capsys):
    pytest.importorskip("pyarrow")
    for seed, name in enumerate(("one", "two")):
        scan = phantoms.make_patient(seed, 0, "valid").scans[0].reconstructions[0]
        (tmp_path / f"{name}.nii.gz").write_bytes(nifti_bytes(scan.hu, scan.affine))
    scans = [str(tmp_path / f"{name}.nii.gz") for name in ("one", "two")]
    words = ["--scan", *scans, "--out", str(tmp_path / "scans.parquet")]
    assert main(["embed", "--workdir", str(old_run), *words]) == 0
    found = embedding_files.read(tmp_path / "scans.parquet")
    assert found.volume_ids.tolist() == found.patients.tolist() == ["one", "two"]
    expected = mg3d_jax.load(old_run).embed_volume(tmp_path / "two.nii.gz")
    np.testing.assert_allclose(found.volumes[1], expected, atol=2e-6)
    assert len(next(iter(found.prompts.values())).classes) == 18
    capsys.readouterr()
    (tmp_path / "more").mkdir()
    shutil.copy(tmp_path / "one.nii.gz", tmp_path / "more")
    words[2] = str(tmp_path / "more" / "one.nii.gz")
    assert main(["embed", "--workdir", str(old_run), *words]) == 2
    assert "one would be the id of several scans" in capsys.readouterr().err


def test_options_that_do_nothing_are_errors(old_run, tmp_path, capsys):
    assert embed(old_run, tmp_path / "valid.csv") == 2
    assert ".npz or .parquet" in capsys.readouterr().err
    for words in (["--batch-size", "0"], ["--policy", "center"]):
        with pytest.raises(SystemExit):
            embed(old_run, tmp_path / "valid.npz", *words)

"""Prepared folders across versions: what 0.1.0 wrote opens and goes on, and bytes change only with the recipe's version."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from reference.synthetic_ct import (
    affine,
    body,
    report_row,
    volume_path,
    write_ctrate,
    write_nifti,
    write_raw_nifti,
    write_tables,
)
from support import ROOT

from mg3d_jax.commands.main import main
from mg3d_jax.data.pipeline import BatchReader, PreparedData
from mg3d_jax.data.records import RecordReader
from mg3d_jax.data.tokens import ReportTokenizer, train_wordpiece
from mg3d_jax.errors import UserError
from mg3d_jax.phantom.dataset import make as make_phantoms
from mg3d_jax.prepare import Settings, prepare, recipe

GOLDEN = Path(__file__).parent / "golden" / "records.json"
SMALL = {"size": (12, 10, 9), "spacing": (32.0, 32.0, 36.0), "zstd_level": 0, "qa_samples": 0}


def two_ctrate(root: Path) -> Settings:
    write_ctrate(root, 2)
    return Settings("ctrate", root, "train", root / "out", **SMALL)


def damaged_headers(root: Path) -> Settings:
    """A rescale that only the metadata table knows, a blank geometry, and padding outside of the field of view."""
    blank, shifted = "train_1_a_1.nii.gz", "train_2_a_1.nii.gz"
    hu = body(seed=5)
    for name in (blank, shifted):
        volume_path(root, name).parent.mkdir(parents=True)
    write_raw_nifti(volume_path(root, blank), (hu.astype(np.int32) + 1024).astype(np.uint16), np.eye(4))
    padded = hu.astype(np.int16)
    padded[:3] = -2000
    write_raw_nifti(volume_path(root, shifted), padded, affine(), slope=1, intercept=-1024)
    about = [
        {"VolumeName": name, "RescaleSlope": 1, "RescaleIntercept": -1024, "XYSpacing": "[8.0, 8.0]", "ZSpacing": 9.0}
        for name in (blank, shifted)
    ]
    write_tables(root, [report_row(blank, "Normal."), report_row(shifted, "1. Nodule of 0. 8 cm - img117.")], about)
    return Settings("ctrate", root, "train", root / "out", **SMALL)


def arrays_of_a_table(root: Path) -> Settings:
    hu = body(seed=6)
    write_nifti(root / "a.nii", hu, affine(), "LPS")
    np.save(root / "b.npy", body(seed=8)[::-1, ::-1].transpose(2, 1, 0))
    lines = [
        "volume,report,patient,split,spacing,axes,Nodule",
        'a.nii,"FINDINGS: Large heart. IMPRESSION: Cardiomegaly.",P1,train,,,1',
        'b.npy,"No nodule. Ca. 4 mm cyst.",P2,train,9 8 8,SPL,0',
    ]
    (root / "table.csv").write_text("\n".join(lines))
    return Settings("csv", root / "table.csv", "train", root / "out", **SMALL)


def slices_of_ctrg(root: Path) -> Settings:
    grey = np.rint((np.clip(body(seed=7), -1200, 800) + 1200) / 2000 * 255).astype(np.uint8)
    (root / "11").mkdir()
    for k in range(grey.shape[2]):
        Image.fromarray(grey[::-1, ::-1, k].T).save(root / "11" / f"{k}.png")
    (root / "ctrg.json").write_text(json.dumps({"train": [{"id": "11", "report": "Normal.", "result": "None."}]}))
    given = {"array_spacing": (8.0, 8.0, 9.0), "array_axes": "LPS", "slice_window": (-1200.0, 800.0)}
    return Settings("ctrg", root, "train", root / "out", **SMALL, **given)


def changed(make, **changes):
    def settings(root: Path) -> Settings:
        return Settings(**{**vars(make(root)), **changes})

    return settings


CASES = {
    "ctrate": two_ctrate,
    "ctrate, fraction": changed(two_ctrate, policy="fraction"),
    "ctrate, lung": changed(two_ctrate, policy="lung", size=(20, 20, 20), spacing=(12.0, 12.0, 12.0)),
    "ctrate, uint8 window": changed(two_ctrate, window=(-1000.0, 1000.0)),
    "ctrate, packed": changed(two_ctrate, zstd_level=3),
    "damaged headers": damaged_headers,
    "csv": arrays_of_a_table,
    "ctrg": slices_of_ctrg,
}


def digest(folder: Path) -> str:
    """Of all records of a prepared folder, in order."""
    reader = RecordReader(folder)
    found = hashlib.sha256()
    for index in range(len(reader)):
        data = reader.read_bytes(index)
        found.update(len(data).to_bytes(8) + data)
    return found.hexdigest()


def test_the_bytes_of_records_change_only_with_the_recipes_version(tmp_path):
    golden = json.loads(GOLDEN.read_text())
    found = {}
    for name, make in CASES.items():
        root = tmp_path / name.replace(", ", "_").replace(" ", "_")
        root.mkdir()
        settings = make(root)
        assert prepare(settings)["bad"] == []
        found[name] = digest(settings.out)
    changed = [name for name in CASES if found[name] != golden["digests"].get(name)]
    now = json.dumps({"recipe_version": recipe.RECIPE_VERSION, "digests": found}, indent=1)
    if golden["recipe_version"] == recipe.RECIPE_VERSION:
        assert not changed, (
            f"the records of {changed} have other bytes than recipe version {recipe.RECIPE_VERSION} gives: raise "
            f"RECIPE_VERSION in mg3d_jax/prepare/recipe.py if that is meant (begun preparations are refused then), and write "
            f"{GOLDEN.name} anew:\n{now}"
        )
    assert not changed and golden["recipe_version"] == recipe.RECIPE_VERSION, f"write {GOLDEN.name} anew:\n{now}"


@pytest.fixture(scope="module")
def phantoms(tmp_path_factory) -> Path:
    """The folder in which the fixtures of 0.1.0 were made: its data set is in `phantoms`."""
    folder = tmp_path_factory.mktemp("made")
    make_phantoms(folder / "phantoms", patients=8, valid=4, seed=0, workers=1, style="plain")
    return folder


def of_version_0_1_0(name: str, folder: Path) -> Path:
    """A copy of one of its prepared folders."""
    return shutil.copytree(ROOT / "tests" / "fixtures" / "v0.1.0" / name, folder / name)


def command(out: Path, split: str = "train", *more: str) -> list[str]:
    line = ["prepare", "--source", "ctrate", "--root", "phantoms", "--split", split, "--out", str(out)]
    line += ["--workers", "1", "--qa-samples", "0"]
    return [*line, "--size", "16", "16", "16", "--spacing", "20", "18", "20", *more]


def records(folder: Path) -> list[bytes]:
    reader = RecordReader(folder)
    return [reader.read_bytes(index) for index in range(len(reader))]


def test_a_half_done_preparation_of_0_1_0_goes_on(phantoms, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(phantoms)
    out = of_version_0_1_0("half", tmp_path)
    done = out / "records-00000-of-00003.array_record"
    before = done.stat().st_mtime_ns
    assert main(command(out, "train", "--shard-records", "3")) == 0
    assert "was begun by mg3d_jax 0.1.0; mg3d_jax" in capsys.readouterr().err
    assert done.stat().st_mtime_ns == before  # what was done is not done again
    assert main(command(tmp_path / "fresh", "train", "--shard-records", "3")) == 0
    assert records(out) == records(tmp_path / "fresh")
    shards = sorted(path.name for path in out.glob("*.array_record"))
    assert len(shards) == 3 and not list(out.glob(".*.partial"))
    for name in shards:
        assert (out / name).read_bytes() == (tmp_path / "fresh" / name).read_bytes()
    manifest = json.loads((out / "manifest.json").read_text())
    assert (manifest["recipe_version"], manifest["code"]) == (1, {"mg3d_jax": "0.1.0", "commit": None})
    assert "code_version" not in manifest and "code_version" not in manifest["settings"]
    assert main(["prepare", "--verify", "--out", str(out)]) == 0


@pytest.mark.parametrize("split", ["train", "valid"])
def test_a_finished_preparation_of_0_1_0_is_done_sound_and_the_same(phantoms, tmp_path, monkeypatch, capsys, split):
    monkeypatch.chdir(phantoms)
    out = of_version_0_1_0(split, tmp_path)
    assert main(["prepare", "--verify", "--out", str(out)]) == 0
    before = {path.name: path.read_bytes() for path in out.glob("*.array_record")}
    assert main(command(out, split)) == 0
    shown = capsys.readouterr()
    assert f"{out} was prepared already" in shown.err and " records of " in shown.out
    assert main(command(tmp_path / "fresh", split)) == 0
    for name, content in before.items():
        assert (out / name).read_bytes() == (tmp_path / "fresh" / name).read_bytes() == content
    assert main(["prepare", "--verify", "--out", str(out)]) == 0
    # A second time nothing changes any more.
    manifest = (out / "manifest.json").read_bytes()
    assert main(command(out, split)) == 0
    assert (out / "manifest.json").read_bytes() == manifest


def test_the_training_pipeline_reads_what_0_1_0_prepared(tmp_path):
    out = of_version_0_1_0("train", tmp_path)
    data = PreparedData((str(out),), volume_size=(16, 16, 16))
    sentences = [sentence for index in range(len(data)) for sentence in data.text(index).sentences]
    batch = BatchReader(data, ReportTokenizer(train_wordpiece(sentences, 400), 64, 16))(range(len(data)))
    assert batch["valid"].all() and batch["volume"].shape == (8, 16, 16, 16)
    assert len(set(batch["report_id"].tolist())) == 8


def test_the_commit_neither_stops_a_preparation_nor_changes_its_bytes(tmp_path, monkeypatch):
    write_ctrate(tmp_path / "root", 4)
    changes = {**SMALL, "shard_records": 2}
    base = Settings("ctrate", tmp_path / "root", "train", tmp_path / "parts", **changes)
    monkeypatch.setattr(recipe, "code", lambda: {"mg3d_jax": "0.2.0", "commit": "aaaa"})
    prepare(replace(base, out=tmp_path / "whole"))
    for index, commit in ((0, "aaaa"), (1, "bbbb+"), (2, None)):
        monkeypatch.setattr(recipe, "code", lambda commit=commit: {"mg3d_jax": "0.2.0", "commit": commit})
        prepare(replace(base, shard=(index, 3)))
    for name in ("manifest.json", "index.jsonl", *(path.name for path in (tmp_path / "whole").glob("*.array_record"))):
        assert (tmp_path / "parts" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    assert json.loads((tmp_path / "parts" / "manifest.json").read_text())["code"]["commit"] == "aaaa"


def test_recipes_are_never_mixed_and_finished_folders_stay(tmp_path, monkeypatch, caplog):
    write_ctrate(tmp_path / "root", 2)
    base = Settings("ctrate", tmp_path / "root", "train", tmp_path / "out", **{**SMALL, "shard_records": 2})
    prepare(base)
    before = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    prepare(replace(base, out=tmp_path / "half", shard=(0, 2)))
    monkeypatch.setattr(recipe, "RECIPE_VERSION", 2)
    with pytest.raises(
        UserError, match=r"plan\.json: begun by mg3d_jax .* with recipe version 1; this code's is 2 .*delete"
    ):
        prepare(replace(base, out=tmp_path / "half"))
    with caplog.at_level(logging.WARNING):
        assert prepare(base)["records"] == 3
    assert "with recipe version 1; it can be used and stays as it is" in caplog.text
    assert {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()} == before
    assert len(RecordReader(tmp_path / "out")) == 3
    monkeypatch.setattr(recipe, "RECIPE_VERSION", 0)
    with pytest.raises(UserError, match=r"recipe version 1; this code knows recipes up to 0: go on with that version"):
        prepare(base)


def test_a_plan_without_a_recipe_is_named(tmp_path):
    write_ctrate(tmp_path / "root", 2)
    base = Settings("ctrate", tmp_path / "root", "train", tmp_path / "out", **SMALL)
    prepare(base)
    path = tmp_path / "out" / "work" / "plan.json"
    plan = json.loads(path.read_text())
    path.write_text(json.dumps({**plan, "recipe_version": "one"}))
    with pytest.raises(UserError, match=r"plan\.json: recipe_version is 'one', not a number: delete"):
        prepare(base)

"""`mg3d prepare` at work: killed and resumed, split over machines, fetched piece by piece, verified, leak-checked."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from reference.synthetic_ct import affine, body, report_row, volume_path, write_ctrate, write_nifti, write_tables
from test_prepare_folder import settings

from mg3d_jax.benchmarks import hounsfield
from mg3d_jax.commands.main import main
from mg3d_jax.data.records import RecordReader
from mg3d_jax.errors import UserError
from mg3d_jax.prepare.estimate import Estimate, check_disk, estimate
from mg3d_jax.prepare.folder import prepare, summary
from mg3d_jax.prepare.geometry import Grid
from mg3d_jax.prepare.leaks import read_index
from mg3d_jax.prepare.listing import Example, Metadata, SourceOptions
from mg3d_jax.prepare.quality import body_part, enclosed_air
from mg3d_jax.prepare.recipe import WORK_FOLDER
from mg3d_jax.prepare.selection import list_source
from mg3d_jax.prepare.shards import Outcome, Recipe, write_shard


def tree(folder: Path) -> dict[str, bytes]:
    """Every file of a prepared folder but the plan (it holds the root's path)."""
    files = (p for p in folder.rglob("*") if p.is_file() and p.name != "plan.json")
    return {str(p.relative_to(folder)): p.read_bytes() for p in files}


def command(root: Path, out: Path, *more: str) -> list[str]:
    line = [sys.executable, "-m", "mg3d_jax", "prepare", "--source", "ctrate", "--root", str(root), "--split", "train"]
    line += ["--out", str(out), "--size", "24", "20", "18", "--spacing", "16", "16", "18", "--shard-records", "2"]
    return [*line, "--qa-samples", "0", *more]


def children(pid: int) -> list[int]:
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rsplit(")", 1)[1].split()
        except OSError:
            continue
        if int(fields[1]) == pid:
            found.append(int(path.parent.name))
    return found


@pytest.mark.processes
def test_killed_at_any_moment_and_started_again_gives_the_same_bytes(tmp_path):
    write_ctrate(tmp_path / "root", 9)
    prepare(settings(tmp_path / "root", tmp_path / "whole", shard_records=2))
    out = tmp_path / "killed"
    for shards in (1, 3):  # kill once this many shards are done, in the middle of the next
        process = subprocess.Popen(command(tmp_path / "root", out, "--workers", "2"), stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 400  # a loaded machine is slow
        while len(list((out / "work").glob("records-*.json"))) < shards and process.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.005)
        workers = [child for parent in children(process.pid) for child in (parent, *children(parent))]
        process.send_signal(signal.SIGKILL)
        process.wait()
        for _ in range(5000):  # no orphan stays behind
            if not any(Path(f"/proc/{pid}").exists() for pid in workers):
                break
            time.sleep(0.02)
        else:
            pytest.fail(f"workers {workers} outlived the main process")
    # A shard is done when its sidecar is there, which the kill may have come before.
    done = [out / f"{sidecar.stem}.array_record" for sidecar in (out / "work").glob("records-*.json")]
    before = {path.name: path.stat().st_mtime_ns for path in done}
    subprocess.run(command(tmp_path / "root", out, "--workers", "2"), check=True, capture_output=True)
    assert all((out / name).stat().st_mtime_ns == when for name, when in before.items())  # what was done is not redone
    assert tree(out) == tree(tmp_path / "whole")


def test_shares_of_several_machines_make_one_folder(tmp_path):
    write_ctrate(tmp_path / "root", 6)
    prepare(settings(tmp_path / "root", tmp_path / "whole", shard_records=2))
    for index in (2, 0, 1):
        result = prepare(settings(tmp_path / "root", tmp_path / "parts", shard_records=2, shard=(index, 3)))
        assert (result is None) == (index != 1)  # the last to finish writes the manifest
    assert tree(tmp_path / "parts") == tree(tmp_path / "whole")
    with pytest.raises(UserError, match="0 <= i < n"):
        prepare(settings(tmp_path / "root", tmp_path / "parts", shard=(3, 3)))


def test_volumes_can_be_fetched_one_by_one_and_are_deleted(tmp_path):
    root, store = tmp_path / "root", tmp_path / "store of scans"
    names = write_ctrate(root, 4)
    prepare(settings(root, tmp_path / "whole"))
    store.mkdir()
    for name in names:
        volume_path(root, name).rename(store / name)
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    fetch = f"mkdir -p {{dir}}/{{split}}/{{patient}} && cp '{store}'/{{name}} {{dir}}/{{split}}/{{patient}}/"
    old = os.environ.get("TMPDIR")
    os.environ["TMPDIR"] = str(scratch)
    try:
        prepare(settings(root, tmp_path / "fetched", fetch=fetch, workers=2))
    finally:
        os.environ.pop("TMPDIR") if old is None else os.environ.update(TMPDIR=old)
    assert [p for p in scratch.rglob("*") if p.name.endswith(".nii.gz")] == []
    got, expected = RecordReader(tmp_path / "fetched"), RecordReader(tmp_path / "whole")
    assert [got.read_bytes(i) for i in range(5)] == [expected.read_bytes(i) for i in range(5)]
    with pytest.raises(UserError, match="placeholder"):
        prepare(settings(root, tmp_path / "x", fetch="cp {nme} {dir}"))


def test_a_fetch_that_fails_is_listed_and_tried_again_next_time(tmp_path, monkeypatch):
    monkeypatch.setattr("mg3d_jax.prepare.fetch._WAIT_SECONDS", 0.0)
    root, store = tmp_path / "root", tmp_path / "store"
    names = write_ctrate(root, 4)
    store.mkdir()
    for name in names[1:]:
        volume_path(root, name).rename(store / name)
    held_back = (store / names[-1]).rename(tmp_path / names[-1])
    changes = {"fetch": f"cp {store}/{{name}} {{dir}}", "shard_records": 2, "max_bad_share": 0.5}
    manifest = prepare(settings(root, tmp_path / "out", **changes))
    assert manifest["records"] == 4 and "fetch failed 3 times: cp" in manifest["bad"][0]["reason"]
    held_back.rename(store / names[-1])
    manifest = prepare(settings(root, tmp_path / "out", **changes))
    assert manifest["records"] == 5 and manifest["bad"] == []


@pytest.mark.parametrize("how", ["written", "moved", "with the root moved"])
def test_a_repaired_volume_is_read_again_and_nothing_else(tmp_path, how):
    root, out = tmp_path / "root", tmp_path / "out"
    names = write_ctrate(root, 4)
    prepare(settings(root, tmp_path / "whole", shard_records=1))
    path = volume_path(root, names[0])
    good = path.read_bytes()
    path.write_bytes(good[:2000])
    with pytest.raises(UserError, match="repair them and run the same command again"):
        prepare(settings(root, out, shard_records=1))
    before = {p.name: p.stat().st_mtime_ns for p in out.glob("*.array_record")}
    assert len(before) == 4
    with pytest.raises(UserError, match="are bad"):  # nothing was repaired: nothing is read again
        prepare(settings(root, out, shard_records=1))
    assert {p.name: p.stat().st_mtime_ns for p in out.glob("*.array_record")} == before
    if how == "moved":  # a copy of last year with its old time
        (tmp_path / "copy").write_bytes(good)
        os.utime(tmp_path / "copy", (1e9, 1e9))
        (tmp_path / "copy").rename(path)
    else:
        path.write_bytes(good)
    if how == "with the root moved":
        root = root.rename(tmp_path / "moved")
    manifest = prepare(settings(root, out, shard_records=1))
    assert manifest["records"] == 5 and manifest["bad"] == []
    after = {p.name: p.stat().st_mtime_ns for p in out.glob("*.array_record")}
    assert len(after) == 5 and before.items() <= after.items()
    if how != "with the root moved":
        assert {**tree(out), "qa.jsonl": b"", "manifest.json": b""} == {
            **tree(tmp_path / "whole"), "qa.jsonl": b"", "manifest.json": b""
        }  # fmt: skip


def test_a_volume_that_the_machine_failed_to_read_is_tried_again(tmp_path, monkeypatch):
    import mg3d_jax.prepare.shards as shards

    names = write_ctrate(tmp_path / "root", 4)
    reading = shards.prepare_volume

    def failing(path, *rest, **more):
        if path.name == names[0]:
            raise MemoryError("no memory left")
        if path.name == names[1]:
            raise shards.VolumeError("unreadable: why") from OSError(5, "Input/output error")
        return reading(path, *rest)

    monkeypatch.setattr(shards, "prepare_volume", failing)
    changes = {"shard_records": 2, "max_bad_share": 0.5}
    manifest = prepare(settings(tmp_path / "root", tmp_path / "out", **changes))
    assert sorted(item["reason"] for item in manifest["bad"]) == [
        "system error: failed with MemoryError: no memory left",
        "system error: unreadable: why",
    ]
    monkeypatch.undo()
    manifest = prepare(settings(tmp_path / "root", tmp_path / "out", **changes))
    assert manifest["records"] == 5 and manifest["bad"] == []


def test_a_volume_that_became_whole_while_its_shard_was_made_is_read_again(tmp_path, monkeypatch):
    """As when the data set is still being copied."""
    import mg3d_jax.prepare.shards as shards

    names = write_ctrate(tmp_path / "root", 4)
    reading, path = shards.prepare_volume, volume_path(tmp_path / "root", names[0])
    good = path.read_bytes()
    path.write_bytes(good[:2000])

    def copied_afterwards(volume, *rest, **more):
        try:
            return reading(volume, *rest, **more)
        finally:
            if volume == path:
                time.sleep(0.1)  # the times of files are coarse
                path.write_bytes(good)

    monkeypatch.setattr(shards, "prepare_volume", copied_afterwards)
    assert len(prepare(settings(tmp_path / "root", tmp_path / "out", max_bad_share=0.5))["bad"]) == 1
    monkeypatch.undo()
    assert prepare(settings(tmp_path / "root", tmp_path / "out"))["bad"] == []


def test_a_shard_done_again_without_any_record_leaves_no_file(tmp_path):
    data = np.zeros(8, np.uint8).tobytes()
    for outcome, there in ((Outcome(data, {}, {}, None), True), (Outcome(None, {}, None, "no such file"), False)):
        (tmp_path / WORK_FOLDER).mkdir(exist_ok=True)
        example = Example(tmp_path / "a.nii.gz", "a", "p", "s", "", "", (), Metadata(), "csv")
        found = write_shard(tmp_path, "records-00000-of-00001", iter([(example, outcome)]), 1, lambda _: None, 0.0)
        assert (found["records"] == 1) is there
        assert (tmp_path / found["file"]).exists() is there


def test_no_manifest_outlives_the_shards_it_describes(tmp_path, monkeypatch):
    """A run that is to make one shard anew and is killed."""
    import mg3d_jax.prepare.folder as module

    names = write_ctrate(tmp_path / "root", 4)
    path = volume_path(tmp_path / "root", names[0])
    good = path.read_bytes()
    path.write_bytes(good[:2000])
    changes = {"shard_records": 2, "max_bad_share": 0.5}
    prepare(settings(tmp_path / "root", tmp_path / "out", **changes))
    path.write_bytes(good)

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "write_shard", killed)
    with pytest.raises(KeyboardInterrupt):
        prepare(settings(tmp_path / "root", tmp_path / "out", **changes))
    assert not (tmp_path / "out" / "manifest.json").exists()
    monkeypatch.undo()
    assert prepare(settings(tmp_path / "root", tmp_path / "out", **changes))["records"] == 5


def test_a_damaged_sidecar_is_said_and_its_shard_done_again(tmp_path, capsys):
    write_ctrate(tmp_path / "root", 4)
    prepare(settings(tmp_path / "root", tmp_path / "out", shard_records=2))
    before = tree(tmp_path / "out")
    (tmp_path / "out" / "work" / "records-00001-of-00003.json").write_bytes(b'{"file": "rec')
    prepare(settings(tmp_path / "root", tmp_path / "out", shard_records=2))
    assert "records-00001-of-00003.json: cannot be read as JSON" in capsys.readouterr().err
    assert tree(tmp_path / "out") == before
    (tmp_path / "out" / "work" / "plan.json").write_bytes(b"")
    with pytest.raises(UserError, match=r"plan\.json: cannot be read as JSON"):
        prepare(settings(tmp_path / "root", tmp_path / "out", shard_records=2))


def test_verify_finds_what_is_damaged(tmp_path, capsys):
    write_ctrate(tmp_path / "root", 4)
    out = tmp_path / "out"
    prepare(settings(tmp_path / "root", out, shard_records=2))
    assert main(["prepare", "--verify", "--out", str(out)]) == 0
    assert "sound" in capsys.readouterr().out
    manifest = json.loads((out / "manifest.json").read_text())
    manifest["unique_reports"] += 1
    (out / "manifest.json").write_text(json.dumps(manifest))
    assert main(["prepare", "--verify", "--out", str(out)]) == 2
    assert "unique_reports" in capsys.readouterr().err
    shard = out / manifest["shards"][0]["file"]
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    (out / manifest["shards"][1]["file"]).unlink()
    assert main(["prepare", "--verify", "--out", str(out)]) == 2
    error = capsys.readouterr().err
    assert "sha256" in error and "is missing" in error


def test_verify_says_how_many_more_faults_there_are(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("mg3d_jax.commands.prepare.verify", lambda _: [f"fault {n}" for n in range(60)])
    assert main(["prepare", "--verify", "--out", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert "60 faults" in error and "fault 49\n" in error and "fault 50" not in error and "and 10 more" in error


def test_uint8_window_halves_the_bytes_and_keeps_hu_to_half_a_step(tmp_path):
    write_ctrate(tmp_path / "root", 2)
    prepare(settings(tmp_path / "root", tmp_path / "full", zstd_level=0))
    prepare(settings(tmp_path / "root", tmp_path / "byte", zstd_level=0, window=(-1000.0, 1000.0)))
    full, byte = RecordReader(tmp_path / "full"), RecordReader(tmp_path / "byte")
    for index in range(3):
        a, b = full[index].volume, byte[index].volume
        assert b.dtype == np.int16
        assert np.abs(np.clip(a, -1000, 1000) - b).max() <= 2000 / 255 / 2 + 0.5
        assert len(full.read_bytes(index)) - len(byte.read_bytes(index)) == pytest.approx(a.size, abs=64)


def test_fraction_policy_has_no_one_spacing(tmp_path):
    write_ctrate(tmp_path / "root", 2)
    manifest = prepare(settings(tmp_path / "root", tmp_path / "out", policy="fraction"))
    assert manifest["spacing"] is None and "a spacing that varies" in summary(manifest)
    record = RecordReader(tmp_path / "out")[0]
    np.testing.assert_allclose(
        np.diag(record.affine)[:3] * (24, 20, 18), np.array([384, 320, 324]) * (0.88, 0.875, 0.656)
    )


def test_estimate_is_of_the_right_size_and_the_disk_is_checked(tmp_path):
    write_ctrate(tmp_path / "root", 3)
    examples = list_source("ctrate", SourceOptions(tmp_path / "root", "train")).examples
    recipe = Recipe(Grid((24, 20, 18), (16.0, 16.0, 18.0)), zstd_level=0)
    assert estimate(examples, recipe, 2) is None  # too few to be worth it
    expected = estimate(examples * 25, recipe, 2)
    assert expected.volumes == 100
    assert expected.disk_bytes == pytest.approx(100 * 24 * 20 * 18 * 2, rel=0.15)
    assert 0.1 < expected.seconds < 100
    packed = estimate(examples * 25, replace(recipe, zstd_level=3), 2)
    assert 0.2 < packed.disk_bytes / expected.disk_bytes < 0.8
    assert "100 volumes to do" in str(expected)
    with pytest.raises(UserError, match="GB free"):
        check_disk(Estimate(1, 1.0, 1e18), tmp_path)


def test_quality_page_shows_slices_and_warnings(tmp_path):
    write_ctrate(tmp_path / "root", 3)
    write_nifti(volume_path(tmp_path / "root", "train_3_a_1.nii.gz"), body(seed=3)[:, :, :12], affine(), "LPS")
    prepare(settings(tmp_path / "root", tmp_path / "out", qa_samples=3))
    lines = [json.loads(line) for line in (tmp_path / "out" / "qa.jsonl").read_text().splitlines()]
    assert len(lines) == 4
    warned = [line for line in lines if line["warnings"]]
    assert [line["name"] for line in warned] == ["train_3_a_1.nii.gz"]
    needed = {"spacing", "orientation", "extent", "percentiles", "air", "decision", "warnings", "path", "shape"}
    assert all(needed <= line.keys() for line in lines)
    page = (tmp_path / "out" / "qa.html").read_text()
    assert "truncated: only 108 mm" in page and "data:image/png;base64," in page
    assert (tmp_path / "out" / "qa.png").read_bytes()[:4] == b"\x89PNG"


def test_the_quality_page_shows_reports_labels_and_kinds_of_warnings(tmp_path):
    write_ctrate(tmp_path / "root", 3)
    long = "train_3_a_1.nii.gz"
    write_nifti(volume_path(tmp_path / "root", long), body(seed=3)[:, :, :12] + 60, affine(), "LPS")
    prepare(settings(tmp_path / "root", tmp_path / "out", qa_samples=4))
    page = (tmp_path / "out" / "qa.html").read_text()
    assert "A nodule of 3.5 mm." in page and "Lung nodule" in page and "HU may be off" in page
    assert page.index("<h3>train_3_a_1") < page.index("<h3>train_1_a_1")  # warnings first
    kinds = re.findall(r'id="(kind\d)"> ([^<(]+) ', page)
    assert {name for _, name in kinds} == {"truncated", "HU may be off"}
    assert all(f"tr:not(.{css})" in page and f'class="{" ".join(c for c, _ in kinds)}"' in page for css, _ in kinds)
    assert page.count("data:image/png") == 4 and long in page


@pytest.mark.parametrize("part", ["chest", "head", "abdomen"])
def test_parts_of_the_body_are_told_apart(part):
    hu = {
        "chest": hounsfield.trunk(), "head": hounsfield.head(), "abdomen": hounsfield.trunk(lungs=False)
    }[part]  # fmt: skip
    assert body_part(hounsfield.noisy(hu, 40), enclosed_air(hu, 2)) == part
    if part == "chest":  # the lungs reach the border
        cut = hu[14:80, 22:58]
        assert body_part(hounsfield.noisy(cut, 40), enclosed_air(cut, 2)) == "chest"


def test_an_index_is_read_whole_or_refused(tmp_path):
    write_ctrate(tmp_path / "root", 2)
    out = tmp_path / "out"
    prepare(settings(tmp_path / "root", out))
    path = out / "index.jsonl"
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]
    lines[0]["name"] = "a\u2028b.nii.gz"  # a line separator to Python's splitlines, not to JSON
    whole = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    path.write_text(whole, encoding="utf-8")
    assert read_index(out) == lines
    for damaged in (whole[1:], whole[: whole.rindex("{") + 9]):  # a broken line; one that a kill cut short
        path.write_text(damaged, encoding="utf-8")
        with pytest.raises(UserError, match=r"index\.jsonl has 2 whole lines and [01] damaged ones for 3 records"):
            read_index(out)
    path.unlink()
    with pytest.raises(UserError, match="0 whole lines"):
        read_index(out)


def test_leaks_between_splits_and_patients_are_errors_unless_meant(tmp_path):
    root = tmp_path / "root"
    write_ctrate(root, 3)
    write_ctrate(root, 2, split="valid")
    prepare(settings(root, tmp_path / "train"))
    # The same voxels as a training volume, and one patient of the training split.
    write_nifti(volume_path(root, "valid_1_a_1.nii.gz", "valid"), body(seed=31), affine(), "LPS")
    valid = {"split": "valid", "against": (tmp_path / "train",)}
    with pytest.raises(UserError, match=r"valid_2_a_1\.nii\.gz = train_2_a_1\.nii\.gz"):
        prepare(settings(root, tmp_path / "valid", **valid))
    assert not (tmp_path / "valid").exists()  # before any is prepared
    manifest = prepare(settings(root, tmp_path / "valid", **valid, allow_leak=("duplicate-volume",)))
    assert [leak["name"] for leak in manifest["allowed_leaks"]] == ["duplicate-volume"]
    assert (
        "valid_1_a_1.nii.gz = train_3_a_1.nii.gz" in manifest["allowed_leaks"][0]["items"]
    )  # stored in other axes there
    with pytest.raises(UserError, match="identical-split"):
        prepare(settings(root, tmp_path / "again", against=(tmp_path / "train",)))
    rows = [report_row("train_2_a_1.nii.gz", "Normal."), report_row("valid_2_a_1.nii.gz", "Normal.")]
    write_tables(root, rows, split="valid")
    with pytest.raises(UserError, match=r"patient-in-two-splits \(and split 'valid'\): 1: train_2"):
        prepare(settings(root, tmp_path / "train3"))


def test_ctrgs_identical_validation_and_test_lists_are_refused(tmp_path):
    rows = [{"id": f"{n}.nii.gz", "report": "Normal.", "result": ""} for n in (1, 2)]
    (tmp_path / "ctrg.json").write_text(json.dumps({"train": [], "val": rows, "test": rows}))
    for n in (1, 2):
        write_nifti(tmp_path / f"{n}.nii.gz", body(seed=n), affine())
    base = settings(tmp_path, tmp_path / "out").__dict__ | {"source": "ctrg", "split": "val"}
    with pytest.raises(UserError, match="identical-split"):
        prepare(type(settings(tmp_path, tmp_path))(**base))
    manifest = prepare(type(settings(tmp_path, tmp_path))(**base | {"allow_leak": ("identical-split",)}))
    assert manifest["records"] == 2 and manifest["source"] == "ctrg"

"""Small files that are written whole or not at all, and read in spite of a kill."""

import math
import os

import pytest

from mg3d_jax import files
from mg3d_jax.errors import UserError


def test_json_comes_back(tmp_path):
    document = {"naïve": [1, 2.5, None], "nested": {"a": True}}
    files.write_json(tmp_path / "a.json", document)
    assert files.read_json(tmp_path / "a.json") == document
    assert os.listdir(tmp_path) == ["a.json"]


def test_a_file_name_that_is_no_text_comes_back(tmp_path):
    name = os.fsdecode(b"scan-\xe4.nii.gz")
    files.write_json(tmp_path / "a.json", {"bad": name})
    assert files.read_json(tmp_path / "a.json") == {"bad": name}


def test_a_failed_write_leaves_the_file_as_it_was(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    files.write_json(path, {"a": 1})
    with pytest.raises(ValueError, match="JSON compliant"):
        files.write_json(path, {"a": math.nan})
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space"):
        files.write_json(path, {"a": 2})
    assert files.read_json(path) == {"a": 1} and os.listdir(tmp_path) == ["a.json"]


@pytest.mark.parametrize("text", ["", "{", "[1]", "\x00"])
def test_what_is_no_object_is_named(tmp_path, text):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(UserError, match=r"a\.json"):
        files.read_json(tmp_path / "a.json")
    with pytest.raises(UserError, match=r"absent\.json"):
        files.read_json(tmp_path / "absent.json")


def test_lines_survive_a_kill_in_the_middle_of_one(tmp_path, capsys):
    path, entries = tmp_path / "a.jsonl", [{"step": 1, "text": "line separator \u2028 within"}, {"step": 2}]
    assert files.read_lines(path) == ([], 0)
    files.write_lines(path, entries)
    whole = path.read_bytes()
    assert files.read_lines(path) == (entries, 0)
    path.write_bytes(whole + b'{"step": 3')
    assert files.read_lines(path) == (entries, 0)
    path.write_bytes(b"\xff\x00\n[1]\n" + whole)
    assert files.read_lines(path) == (entries, 2)
    assert files.whole_lines(path) == entries
    assert capsys.readouterr().err == f"{path}: 2 damaged of 4 lines are left out\n"


def test_what_killed_processes_left_is_removed(tmp_path):
    path = tmp_path / "a[1].json"
    for pid in (1, 2):
        (tmp_path / f".{path.name}.{pid}.partial").write_text("{")
    (tmp_path / ".other.json.1.partial").write_text("{")
    files.remove_partials(path)
    assert os.listdir(tmp_path) == [".other.json.1.partial"]

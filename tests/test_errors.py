"""What libraries raise for the doings of users and sites is one line with the file and the remedy."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from support import environment
from tokenizers import Tokenizer

from mg3d_jax import charts
from mg3d_jax import config as config_lib
from mg3d_jax.commands.main import main
from mg3d_jax.data.records import read_manifest
from mg3d_jax.data.tokens import load_tokenizer, save_tokenizer, train_wordpiece
from mg3d_jax.errors import AGAIN, TryAgainError, UserError, translated
from mg3d_jax.registry import load_plugins


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_wordpiece({"the lung is clear", "the heart is normal"}, 100)


def test_a_tokenizer_is_written_as_the_library_writes_it(tokenizer: Tokenizer, tmp_path: Path) -> None:
    save_tokenizer(tokenizer, tmp_path)
    tokenizer.save(str(tmp_path / "library.json"))
    assert (tmp_path / "tokenizer.json").read_bytes() == (tmp_path / "library.json").read_bytes()


@pytest.mark.parametrize("fault", ["cut", "no vocabulary", "unknown part", "no special tokens"])
def test_a_broken_tokenizer_is_named(tokenizer: Tokenizer, tmp_path: Path, fault: str) -> None:
    """Rust says so by a bare `Exception`; the last by a panic, which Python does not take for an `Exception`."""
    text = tokenizer.to_str()
    parts = json.loads(text)
    if fault == "no vocabulary":
        parts["model"]["vocab"] = {}
    if fault == "unknown part":
        parts["pre_tokenizer"] = {"type": "Nothing"}
    if fault == "no special tokens":
        parts["post_processor"]["special_tokens"] = {}
    (tmp_path / "tokenizer.json").write_text(text[:200] if fault == "cut" else json.dumps(parts))
    with pytest.raises(UserError, match=rf"{tmp_path}.* is no tokenizer .*Copy its files again"):
        load_tokenizer(str(tmp_path))


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux: a full device")
def test_a_full_disk_under_a_library_is_recognised(tokenizer: Tokenizer) -> None:
    with pytest.raises(Exception) as rust:
        tokenizer.save("/dev/full")
    assert type(rust.value) is Exception and "No space left on device. Make room" in str(translated(rust.value))


def test_what_is_translated_and_what_is_a_mistake_of_the_program() -> None:
    gone = translated(ValueError("UNKNOWN: Gloo AllGather failed: Connection reset by peer"))
    assert isinstance(gone, TryAgainError) and gone.code == AGAIN
    assert "host is used up" in str(translated(MemoryError("Unable to allocate 9 GiB")))
    assert "no/such: No such file" in str(translated(FileNotFoundError(2, "No such file or directory", "no/such")))
    files = 'RESOURCE_EXHAUSTED: Failed to open: "x" [OS error 24: EMFILE Too many open files]'
    assert "ulimit -n" in str(translated(ValueError(files)))
    assert translated(ValueError("shapes differ")) is None and translated(KeyError("x")) is None


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("def get_config(:", r"SyntaxError: .*\(config\.py, line 1\)"),
        ("def get_config(arg=''):\n    return 1 / 0", r"ZeroDivisionError: .*config\.py, line 2"),
        ("import nothing_of_that_name", "ModuleNotFoundError"),
        ("def get_config(arg=''):\n    pass", "returns a NoneType"),
        ("\0", "null bytes"),
    ],
)
def test_mistakes_in_code_of_users_are_one_line(tmp_path: Path, text: str, says: str) -> None:
    file = tmp_path / "config.py"
    file.write_text(text)
    with pytest.raises(UserError, match=rf"{file}.*{says}"):
        config_lib.load(str(file))


def test_a_plugin_that_fails_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "plugin_that_fails.py").write_text("1 / 0")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match=r"'plugin_that_fails' .* ZeroDivisionError: .*\.py, line 1"):
        load_plugins(["plugin_that_fails"])


def test_a_manifest_without_its_parts_is_named(tmp_path: Path) -> None:
    for parts in ({}, {"shards": [{"file": "x"}]}):
        (tmp_path / "manifest.json").write_text(json.dumps({"format_version": 1} | parts))
        with pytest.raises(UserError, match=r"manifest\.json lacks its shards.*; prepare the folder again"):
            read_manifest(tmp_path)


def test_dollars_in_names_are_no_formulas() -> None:
    def draw(axes: object) -> None:
        axes.plot([1, 2], label="cost $ of $\\bad{ a")  # type: ignore[attr-defined]
        axes.legend(title="$x_{")  # type: ignore[attr-defined]

    text = charts.svg(charts.Chart("a $ b", draw))
    assert "cost $ of $\\bad{ a" in text and "$x_{" in text


def test_where_a_file_is_in_the_way_the_command_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "out").write_text("")
    words = [
        "prepare",
        "--source",
        "csv",
        "--root",
        str(tmp_path / "t.csv"),
        "--split",
        "a",
        "--out",
        str(tmp_path / "out"),
    ]
    (tmp_path / "t.csv").write_text("volume,findings\nv.nii,clear lungs\n")
    assert main(words) == 2
    assert f"{tmp_path / 'out'}" in capsys.readouterr().err


def test_output_that_nobody_reads_is_no_error() -> None:
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "mg3d_jax", "--help"]
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, env=environment(), text=True, timeout=60)
    os.close(write)
    assert (done.returncode, done.stderr) == (0, "")

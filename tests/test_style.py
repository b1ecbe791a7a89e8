"""Rules that a program can check: ruff, logging, paths. Imports: `test_floors.py`; types: `test_typing.py`."""

import ast
import re
import subprocess
import sys

import pytest
from support import ROOT


@pytest.mark.parametrize("command", [["check"], ["format", "--check"]])
def test_ruff(command):
    done = subprocess.run([sys.executable, "-m", "ruff", *command, "."], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


# Modules that print still: take a line out once the module logs.
PRINTING: set[str] = set()


def test_library_code_logs_and_commands_print():
    # A command of an exported folder prints, too.
    allowed = (
        "commands/",
        "benchmarks/",
        "config/table.py",
        "log.py",
        "progress.py",
        "interop/torch_template/verify_mg3d.py",
    )
    printing = {
        name
        for path in (ROOT / "mg3d_jax").rglob("*.py")
        if not (name := path.relative_to(ROOT / "mg3d_jax").as_posix()).startswith(allowed)
        and any(
            isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
            for node in ast.walk(ast.parse(path.read_text()))
        )
    }
    assert printing - PRINTING == set(), "use logger = logging.getLogger(__name__), or return it to the command"
    assert PRINTING - printing == set(), "fixed: take these out of PRINTING"


def test_files_that_texts_name_exist():
    top = re.compile(r"(?<![\w/.])((?:mg3d_jax|configs|launch|tests|docs|examples)/[\w./-]*\w)")
    room = re.compile(r"`((?:[a-z]+/)+[a-z_]+\.py)`")
    for path in [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *(ROOT / "mg3d_jax").rglob("*.py")]:
        text = path.read_text()
        gone = [name for name in top.findall(text) if not (ROOT / name).exists()]
        gone += [
            name for name in room.findall(text) if not any((ROOT / top / name).exists() for top in ("", "mg3d_jax"))
        ]
        assert [name for name in gone if "vX" not in name] == [], (
            f"{path.relative_to(ROOT)} names files that are not there"
        )


def test_no_path_of_a_machine_is_committed():
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    pattern = re.compile(r"(?<![\w.])/(work|root|home)/")
    for name in listed.stdout.split():
        path = ROOT / name
        if path.suffix in (".py", ".md", ".sh", ".toml", ".txt", ".sbatch") and path.is_file():
            assert not pattern.search(path.read_text()) or path.name == "test_style.py", name

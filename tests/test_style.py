"""The house rules that a program can check: ruff, imports that only point down, no path of a machine."""

import ast
import re
import subprocess
import sys

import pytest
from support import ROOT

PACKAGE = ROOT / "mg3d_jax"


@pytest.mark.parametrize("command", [["check"], ["format", "--check"]])
def test_ruff(command):
    done = subprocess.run([sys.executable, "-m", "ruff", *command, "."], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def imported(file):
    """Names of the mg3d_jax modules that a file imports."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


FORBIDDEN = {
    "models": ("mg3d_jax.data", "mg3d_jax.training", "mg3d_jax.evaluation"),
    "objectives": ("mg3d_jax.data", "mg3d_jax.training", "mg3d_jax.models", "mg3d_jax.evaluation"),
    "data": ("mg3d_jax.models", "mg3d_jax.training", "mg3d_jax.objectives", "mg3d_jax.evaluation"),
}


@pytest.mark.parametrize("folder", sorted(FORBIDDEN))
def test_imports_only_point_down(folder):
    for file in sorted((PACKAGE / folder).rglob("*.py")):
        for name in imported(file):
            assert not name.startswith(FORBIDDEN[folder]), f"{file.relative_to(ROOT)} imports {name}"
            assert not name.startswith("mg3d_jax.commands.main"), f"{file.relative_to(ROOT)} imports {name}"


def test_no_path_of_a_machine_is_committed():
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    pattern = re.compile(r"(?<![\w.])/(work|root|home)/")
    for name in listed.stdout.split():
        path = ROOT / name
        if path.suffix in (".py", ".md", ".sh", ".toml", ".txt", ".sbatch") and path.is_file():
            assert not pattern.search(path.read_text()) or path.name == "test_style.py", name

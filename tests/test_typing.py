"""Types: mypy over the whole package, as `[tool.mypy]` in pyproject.toml sets it up."""

import subprocess
import sys
import tomllib

from support import ROOT


def test_mypy():
    done = subprocess.run([sys.executable, "-m", "mypy"], cwd=ROOT, capture_output=True, text=True, timeout=590)
    assert done.returncode == 0, done.stdout + done.stderr


def test_modules_that_are_not_checked_yet_exist():
    overrides = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["mypy"]["overrides"]
    unchecked = [name for group in overrides if group.get("ignore_errors") for name in group["module"]]
    paths = [ROOT.joinpath(*name.split(".")) for name in unchecked]
    assert [str(path) for path in paths if not (path.with_suffix(".py").is_file() or path.is_dir())] == []

"""The package as others install it: what the wheel holds, and that it works outside of a checkout."""

import importlib
import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from support import ROOT

from mg3d_jax import __version__, config_files
from mg3d_jax.errors import UserError

LEFT_OUT = shutil.ignore_patterns(
    ".git", ".venv", "runs", "tests", "docs", "build", "dist", "*.egg-info", "__pycache__", ".*_cache"
)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel, built from a copy (a build leaves folders behind) and without a network; and its files unpacked."""
    folder = tmp_path_factory.mktemp("wheel")
    shutil.copytree(ROOT, folder / "source", ignore=LEFT_OUT)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    done = subprocess.run([*command, "-w", folder, folder / "source"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    (built,) = folder.glob("*.whl")
    with zipfile.ZipFile(built) as archive:
        archive.extractall(folder / "installed")
    return built, folder / "installed"


def test_it_holds_all_files(wheel):
    built, installed = wheel
    assert built.name.startswith(f"mg3d_jax-{__version__}-")
    wanted = {
        path.relative_to(ROOT)
        for path in (ROOT / "mg3d_jax").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    wanted |= {Path("mg3d_jax") / path.relative_to(ROOT) for path in (ROOT / "configs").rglob("*.py")}
    found = {path.relative_to(installed) for path in installed.rglob("*") if path.is_file()}
    assert wanted - found == set()
    assert {path.parts[0].partition("-")[0] for path in found} == {"mg3d_jax"}
    assert Path(f"mg3d_jax-{__version__}.dist-info/licenses/LICENSE") in found


def test_it_works_outside_of_a_checkout(wheel, tmp_path):
    def run(*arguments):
        environment = os.environ | {"PYTHONPATH": str(wheel[1])}
        return subprocess.run(
            [sys.executable, *arguments], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60
        )

    shown = run("-m", "mg3d_jax", "--help")
    assert shown.returncode == 0 and "mg3d <command> --help" in shown.stdout, shown.stderr
    assert run("-m", "mg3d_jax", "--version").stdout == f"mg3d {__version__}\n"
    name = run("-c", "from mg3d_jax import config_files; print(config_files.find('configs/sweeps/quickstart.py:grid'))")
    assert name.stdout.strip() == f"{wheel[1] / 'mg3d_jax' / 'configs' / 'sweeps' / 'quickstart.py'}:grid", name.stderr


def test_a_config_of_the_user_goes_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert config_files.find("configs/quickstart.py:long") == f"{ROOT / 'configs' / 'quickstart.py'}:long"
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "quickstart.py").touch()
    assert config_files.find("configs/quickstart.py:long") == "configs/quickstart.py:long"
    for wrong in ("quickstart.py", "configs/quickstarts.py", "configs/../pyproject.toml", str(tmp_path / "none.py")):
        with pytest.raises(UserError, match=r"does not exist.*configs/pretrain\.py, .*configs/sweeps/quickstart\.py"):
            config_files.find(wrong)


def test_the_entry_point_and_the_python_versions_are_what_they_say():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    module, _, function = project["scripts"]["mg3d"].partition(":")
    assert callable(getattr(importlib.import_module(module), function))
    versions = [one.rpartition(" ")[2] for one in project["classifiers"] if "Python :: 3." in one]
    assert project["requires-python"] == f">={versions[0]}"

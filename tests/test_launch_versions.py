"""`launch/versions.sh`: an environment per interpreter, packages as constrained, one row per interpreter."""

import os
import subprocess
import sys

import pytest
from support import ROOT

FAKE_PYTHON = f"""#!/usr/bin/env bash
# In place of an interpreter: makes environments that hold itself, notes what is installed, has results of tests.
case "$1 $2" in
  "-m venv") mkdir -p "$3/bin" && cp "$0" "$3/bin/python" ;;
  "-m pip") shift 2 && echo "$@" >>"$FAKE/pip" ;;
  "-m pytest") shift 2 && echo "$@" >>"$FAKE/pytest"; echo "$RESULT in 2.00s"; case $RESULT in *failed*) exit 1 ;; esac ;;
  *) exec {sys.executable} "$@" ;;
esac
"""


def run(folder, *words, result, interpreters):
    (folder / "bin").mkdir(exist_ok=True)
    (folder / "bin" / "python9").write_text(FAKE_PYTHON)
    (folder / "bin" / "python9").chmod(0o755)
    env = os.environ | {
        "PATH": f"{folder / 'bin'}:{os.environ['PATH']}",
        "FAKE": str(folder),
        "RESULT": result,
        "INTERPRETERS": interpreters,
        "VERSIONS_DIR": str(folder / "environments"),
    }
    command = ["bash", str(ROOT / "launch" / "versions.sh"), *words]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("result, code, cells", [("7 passed", 0, "7 | 0"), ("2 failed, 5 passed", 1, "5 | 2")])
def test_a_row_for_each_interpreter(tmp_path, result, code, cells):
    done = run(tmp_path, "tests/test_files.py", result=result, interpreters="python9 python9:jax<0.12,numpy<3")
    assert done.returncode == code, done.stderr
    header, _, *rows = done.stdout.splitlines()
    assert header == "| Python | jax | flax | numpy | scipy | passed | failed |"
    assert len(rows) == 2 and all(row.endswith(f" | {cells} |") for row in rows), done.stdout
    first, second = (tmp_path / "pip").read_text().splitlines()
    assert "-r requirements.txt" in first and "hypothesis" in first and "torch" not in first
    assert second.split()[-2:] == ["jax<0.12", "numpy<3"]
    assert (tmp_path / "pytest").read_text().splitlines()[-1].endswith(" tests/test_files.py")


def test_environments_are_used_again_and_default_tests_exist(tmp_path):
    for _ in range(2):
        run(tmp_path, result="1 passed", interpreters="python9")
    assert len((tmp_path / "pip").read_text().splitlines()) == 1
    files = [word for word in (tmp_path / "pytest").read_text().split() if word.startswith("tests/")]
    assert files and all((ROOT / file).is_file() for file in files)

"""Messages: plain lines on stderr for the command line, ordinary log records within another program."""

import logging
import subprocess
import sys

import pytest

from mg3d_jax import log
from mg3d_jax.commands.main import main
from mg3d_jax.errors import UserError


@pytest.fixture
def logger():
    logger = logging.getLogger("mg3d_jax.somewhere")
    yield logger
    log.to_stderr()


def test_bare_lines_on_the_stderr_of_the_moment(logger, capsys):
    log.to_stderr("info")
    log.to_stderr("info")  # twice: still one line
    logger.warning("%d of %d are left out", 3, 4)
    logger.info("news")
    logger.debug("detail")
    assert capsys.readouterr() == ("", "3 of 4 are left out\nnews\n")


@pytest.mark.parametrize("level, shown", [("debug", "abc"), ("info", "bc"), ("warning", "c"), ("error", "")])
def test_the_environment_chooses_the_level(logger, capsys, monkeypatch, level, shown):
    monkeypatch.setenv("MG3D_LOG", level)
    log.to_stderr()
    logger.debug("a")
    logger.info("b")
    logger.warning("c")
    assert capsys.readouterr().err == "".join(f"{letter}\n" for letter in shown)


def test_verbose_before_the_command(logger, capsys, tmp_path):
    assert main(["-v", "report", str(tmp_path)]) == 2
    capsys.readouterr()
    logger.debug("detail")
    assert capsys.readouterr().err == "detail\n"


def test_an_unknown_level_is_a_clear_error(logger, capsys, monkeypatch):
    with pytest.raises(UserError, match=r"MG3D_LOG=loud: .* choose one of debug, info"):
        log.to_stderr("loud")
    monkeypatch.setenv("MG3D_LOG", "loud")
    assert main(["report", "nowhere"]) == 2 and "MG3D_LOG=loud" in capsys.readouterr().err


def test_within_another_program_the_records_are_its_own(tmp_path):
    program = (
        "import logging, sys; logging.basicConfig(format='%(name)s|%(levelname)s|%(message)s', level='INFO')\n"
        "from pathlib import Path; from mg3d_jax import files; files.whole_lines(Path(sys.argv[1]))"
    )
    path = tmp_path / "metrics.jsonl"
    path.write_text("{}\nbroken\n")
    done = subprocess.run([sys.executable, "-c", program, path], capture_output=True, text=True, timeout=60)
    assert done.stderr == f"mg3d_jax.files|WARNING|{path}: 1 damaged of 2 lines are left out\n"

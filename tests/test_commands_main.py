"""`mg3d` itself: its list of commands, the options before a command, a command of the user's own."""

import re
import subprocess
import sys

import pytest
from support import ROOT

from mg3d_jax import __version__
from mg3d_jax.commands.main import main, usage
from mg3d_jax.registry import COMMANDS


def test_readme_and_help_list_the_same_commands():
    readme = (ROOT / "README.md").read_text()
    table = re.findall(r"^\| `mg3d ([\w-]+)` \|", readme, flags=re.MULTILINE)
    listed = re.findall(r"^  ([\w-]+)  +\w", usage().partition("\n\noptions")[0], flags=re.MULTILINE)
    assert table == listed == list(COMMANDS)


def test_commands_that_the_documents_show_exist():
    documents = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("configs/**/*.py"), *ROOT.glob("launch/*")]
    for path in documents:
        for name in re.findall(r"(?:^\s*|\$ |`|\| )mg3d ([a-z]\w*)", path.read_text(), flags=re.MULTILINE):
            assert name in COMMANDS, f"{path.relative_to(ROOT)} shows mg3d {name}"


@pytest.mark.parametrize("words", [[], ["-h"], ["--help"], ["help"], ["-v", "--help"]])
def test_help(words, capsys):
    assert main(words) == 0 and capsys.readouterr().out == usage() + "\n"


def test_version(capsys):
    assert main(["--version"]) == 0 and capsys.readouterr().out == f"mg3d {__version__}\n"


def test_an_unknown_command_names_the_nearest(capsys):
    assert main(["trian"]) == 2
    assert re.match(r"mg3d: there is no command 'trian': .*Did you mean 'train'\?", capsys.readouterr().err)


def test_a_command_of_the_user(tmp_path, monkeypatch, capsys):
    (tmp_path / "own_command.py").write_text(
        "from mg3d_jax.commands import COMMANDS, Command\n"
        "from mg3d_jax.errors import UserError\n\n"
        "COMMANDS.register('greet', Command(__name__, 'say hello'))\n\n\n"
        "def main(argv):\n"
        "    if not argv:\n"
        "        raise UserError('whom? Name somebody')\n"
        "    print('hello', *argv)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    try:
        assert main(["--plugins", "own_command", "greet", "-v", "--plugins", "x"]) == 0
        assert capsys.readouterr().out == "hello -v --plugins x\n"  # what follows the command belongs to it
        assert main(["--plugins=own_command", "greet"]) == 2
        assert capsys.readouterr().err == "mg3d greet: whom? Name somebody\n"
        assert main(["--plugins=own_command", "--help"]) == 0 and re.search("greet +say hello", capsys.readouterr().out)
    finally:
        COMMANDS.unregister("greet")
    assert main(["--plugins=nowhere", "greet"]) == 2 and "the plugin 'nowhere' cannot be" in capsys.readouterr().err


@pytest.mark.parametrize("words", ["'--help'", "'phantom', '--help'", "'prepare', '--help'", "'compare', '--help'"])
def test_light_commands_never_import_jax(words):
    program = f"import sys; sys.modules['jax'] = None\nfrom mg3d_jax.commands.main import main; main([{words}])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "usage: mg3d" in done.stdout, done.stderr

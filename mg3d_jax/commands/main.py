"""`mg3d [options] <command> ...`: finds the command, shows the library's messages, turns a `UserError` into one line."""

from __future__ import annotations

import argparse
import importlib
import logging
import os
import select
import sys
from contextlib import suppress

from mg3d_jax import __version__, arithmetic, log
from mg3d_jax.errors import translated
from mg3d_jax.progress import leave_terminal
from mg3d_jax.registry import COMMANDS, load_plugins

logger = logging.getLogger(__name__)

OPTIONS = f"""\
options, before the command:
  -v, --verbose         every message; {log.LEVEL_VARIABLE}=debug, info, warning or error in the environment does it too
  --plugins MODULE,...  Python modules that register commands, sources, objectives, ... of your own
  --version             the version and nothing else"""


def usage() -> str:
    width = max(map(len, COMMANDS))
    commands = "\n".join(f"  {name:<{width}}  {command.summary}" for name, command in COMMANDS.items())
    return (
        f"usage: mg3d [options] <command> ...\n\ncommands:\n{commands}\n\n{OPTIONS}\n\nmg3d <command> --help says more."
    )


def main(argv: list[str] | None = None) -> int:
    """Runs one command; a `UserError` becomes one readable line on stderr and exit code 2."""
    name = ""
    try:
        options, (name, *rest) = _split(sys.argv[1:] if argv is None else argv)
        log.to_stderr("debug" if options.verbose else None)
        arithmetic.ignore(os.environ)
        load_plugins(options.plugins)
        if name in ("-h", "--help", "help"):
            print(usage())
            return 0
        if name == "--version":
            print(f"mg3d {__version__}")
            return 0
        code = importlib.import_module(COMMANDS[name].module).main(rest) or 0
        sys.stdout.flush()  # here, where an error can be told
        return code
    except KeyboardInterrupt:
        logger.error("mg3d%s: interrupted; the same command goes on", f" {name}" if name in COMMANDS else "")
        return 130  # as of a shell
    except Exception as error:
        if isinstance(error, BrokenPipeError) and _nobody_reads():
            leave_terminal(pipes=True)  # what is left to print goes nowhere, as whoever closed the pipe wanted it
            return 0
        if (known := translated(error)) is None:
            raise
        logger.error("mg3d%s: %s", f" {name}" if name in COMMANDS else "", known)
        return known.code


def _nobody_reads() -> bool:
    """Has the reader of our output left, as `head` does?"""
    with suppress(OSError, ValueError, AttributeError):  # a stream without a descriptor
        poll = select.poll()
        poll.register(sys.stdout.fileno(), select.POLLERR)
        return bool(poll.poll(0))
    return False


def _split(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """The options before the command; the command (or `--help`, `--version`) and its words, at least one."""
    parser = argparse.ArgumentParser(
        prog="mg3d", add_help=False, allow_abbrev=False, usage="mg3d [options] <command> ..."
    )
    parser.add_argument("-v", "--verbose", action="store_true")
    parser.add_argument("--plugins", type=lambda text: text.split(","), default=[])
    parser.add_argument("-h", "--help", dest="first", action="append_const", const="--help", default=[])
    parser.add_argument("--version", dest="first", action="append_const", const="--version")
    parser.add_argument("words", nargs=argparse.REMAINDER)
    options = parser.parse_args(argv)
    return options, options.first or options.words or ["--help"]

"""Where the messages of the library go.

A module says what it does by `logger = logging.getLogger(__name__)`: `info` for news, `warning` for what the user should
look at. Within another program (notebooks, the Python API) these are ordinary log records, under the name `mg3d_jax`.
The command line calls `to_stderr`, which shows them as plain lines. Results that a user asked for are printed to stdout
by the command, not logged.
"""

from __future__ import annotations

import logging
import os
import sys

from mg3d_jax.errors import UserError

LEVEL_VARIABLE = "MG3D_LOG"  # an environment variable, so that the processes that a command starts inherit it
LEVELS = ("debug", "info", "warning", "error")


class PlainStderr(logging.Handler):
    """Writes the message alone, without level or time, to whatever `sys.stderr` is at that moment."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            if sys.stderr is not None:
                print(self.format(record), file=sys.stderr, flush=True)
        except Exception:
            self.handleError(record)


def to_stderr(level: str | None = None) -> None:
    """Shows the messages of this package on stderr, from `level` on. A second call changes the level only.

    Args:
        level: one of `LEVELS`; None takes the environment variable `MG3D_LOG`, else "info".

    Raises:
        UserError: there is no such level.
    """
    level = level or os.environ.get(LEVEL_VARIABLE) or "info"
    if level.lower() not in LEVELS:
        raise UserError(
            f"{LEVEL_VARIABLE}={level}: there is no such level of messages: choose one of {', '.join(LEVELS)}"
        )
    logger = logging.getLogger("mg3d_jax")
    logger.setLevel(level.upper())
    logger.propagate = False  # a library that gives the root logger a handler of its own would show every line twice
    if not any(isinstance(handler, PlainStderr) for handler in logger.handlers):
        logger.addHandler(PlainStderr())

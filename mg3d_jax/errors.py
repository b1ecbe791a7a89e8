"""The one exception for mistakes that the user can correct, and how a full or read-only disk is recognised.

`mg3d` prints its message without a traceback. The message names the file or setting, the value found, and what to do.
"""

from __future__ import annotations

import errno
import os
import re
import traceback

# What a disk does to us. Libraries below orbax and the writers pass on only the text of some of them.
_STORAGE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.ESTALE)


# What stands in the way of a path that a user gave.
_PATH = (
    errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENOTEMPTY, errno.ENAMETOOLONG, errno.ELOOP, errno.EMFILE,
)  # fmt: skip
AGAIN = 75  # EX_TEMPFAIL: launchers understand it as "run me again"
# What JAX's runtime and the libraries of its collectives say when another process of the run is gone.
_OTHERS_GONE = re.compile(
    r"gloo|nccl.*(remote|peer|abort)|connection (reset|closed|refused)|socket closed|heartbeat|coordination service"
    r"|^(unavailable|deadline_exceeded|aborted|cancelled):",
    re.IGNORECASE,
)


class UserError(Exception):
    """Wrong input, configuration or environment. `str(error)` is shown to the user as it is, `code` is the exit code."""

    code = 2


class TryAgainError(UserError):
    """Nothing is wrong with the command: it goes on when it is run again."""

    code = AGAIN


def in_code_of_users(error: BaseException) -> str:
    """What went wrong in a Python file of a user, with the innermost place: `"ZeroDivisionError: ... (FILE, line 3)"`."""
    place = ""
    if error.__traceback__ is not None and not isinstance(error, SyntaxError):  # which says it itself
        last = traceback.extract_tb(error.__traceback__)[-1]
        place = f" ({last.filename}, line {last.lineno})"
    return f"{type(error).__name__}: {error}{place}"


def storage_problem(error: BaseException | None) -> str | None:
    """`"No space left on device"` or alike when that is behind `error` (or what caused it), else None."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in _STORAGE:
            return os.strerror(error.errno)
        for number in _STORAGE:
            if os.strerror(number).lower() in str(error).lower():
                return os.strerror(number)
        error = error.__cause__ or error.__context__
    return None


def translated(error: BaseException) -> UserError | None:
    """What a library raises for the doings of a user or a site, as one line; None for what is a mistake of the program.

    Libraries in C++ and Rust have few types of errors: their texts are looked at.
    """
    if isinstance(error, UserError):
        return error
    where = f"{error.filename}: " if isinstance(error, OSError) and error.filename else ""
    if problem := storage_problem(error):
        return UserError(f"{where}{problem}. Make room or change the permissions; the same command goes on")
    if os.strerror(errno.EMFILE) in str(error):  # tensorstore says it as it says that memory is used up
        return UserError(
            f"{where}too many open files for the limit of this process: raise it (ulimit -n 65536); the same command goes on"
        )
    if isinstance(error, OSError) and error.errno in _PATH and where:
        return UserError(f"{where}{error.strerror or error}. Correct the path, or remove what is in the way")
    if isinstance(error, MemoryError):
        return UserError(
            f"the memory of this host is used up ({error or 'no more details'}): use fewer workers or a smaller batch"
        )
    text = str(error)
    if type(error).__name__ in ("XlaRuntimeError", "JaxRuntimeError", "ValueError"):  # collectives raise the last one
        first = text.strip().partition("\n")[0]
        if _OTHERS_GONE.search(first):
            return TryAgainError(
                f"another process of this run has ended or cannot be reached ({first}); run all of them again"
            )
        if "RESOURCE_EXHAUSTED" in text:
            return UserError(f"the memory of a device is used up ({first}): use a smaller batch, or more devices")
    return None

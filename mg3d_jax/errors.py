"""The one exception for mistakes that the user can correct, and how a full or read-only disk is recognised.

`mg3d` prints its message without a traceback. The message names the file or setting, the value found, and what to do.
"""

from __future__ import annotations

import errno
import os

# What a disk does to us. Libraries below orbax and the writers pass on only the text of some of them.
_STORAGE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.ESTALE)


class UserError(Exception):
    """Wrong input, configuration or environment. `str(error)` is shown to the user as it is."""


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

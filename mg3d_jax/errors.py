"""The one exception for mistakes that the user can mend.

`mg3d` prints its message without a traceback. The message names the file or setting, the value found, and what to do.
"""


class UserError(Exception):
    """Wrong input, configuration or environment. `str(error)` is shown to the user as it is."""

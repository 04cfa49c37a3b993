"""The one exception that a user's mistake raises, and the exit codes that go with it."""

EXIT_USER_ERROR = 2


class UserError(ValueError):
    """Something the user can mend: a setting, a path, a full disk.

    The message is one line that names what is wrong and where. Programs print it without a
    traceback and end with exit code 2; `--debug` shows the traceback.
    """

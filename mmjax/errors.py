"""The exceptions that a user can mend, and the exit code that goes with them."""

EXIT_USER_ERROR = 2


class UserError(ValueError):
    """Something the user can mend: a setting, a path, a full disk.

    The message is one line that names what is wrong and where. Programs print it without a
    traceback and end with exit code 2; `--debug` shows the traceback.
    """


class RecordError(UserError):
    """One record cannot be used: broken bytes, a missing file, no caption.

    The message names the record. Training puts another record in its place and counts it (`mmjax.data.pipeline`).
    """

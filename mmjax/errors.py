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


def one_line(error: Exception) -> str:
    """The start of another library's message, without line breaks: for the end of one of ours."""
    return " ".join(str(error).split())[:300] or type(error).__name__

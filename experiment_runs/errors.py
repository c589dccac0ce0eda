"""The one error that tells a user what to do, and how much of a value its message shows."""

import reprlib
import signal

LONGEST = 4000  # characters of a message


class UserError(Exception):
    """Bad input. The message names the file, the field and the remedy.

    Of a very long one, which repeats what stands in a file, beginning and end are kept.
    """

    exit_code = 2

    def __init__(self, message: str):
        if len(message) > LONGEST:
            message = f"{message[: LONGEST // 2]} ... {message[-LONGEST // 4 :]}"
        super().__init__(message)


class Stopped(KeyboardInterrupt):
    """A signal asked the process to end, and what could be saved is saved."""

    def __init__(self, number: int = signal.SIGINT):
        super().__init__(number)
        self.number = number


def first_line(error: BaseException) -> str:
    """What an error says, not longer than a line."""
    return f"{(str(error) or type(error).__name__).splitlines()[0]:.300}"


def brief(value: object) -> str:
    """A value as a message shows it: not longer than a line, however long it is."""
    return f"{' '.join(SHORT.repr(value).split()):.200}"


SHORT = reprlib.Repr()
SHORT.maxstring = SHORT.maxother = 80

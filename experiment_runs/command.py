"""Where an error becomes a message: one line that says what to do, and an exit code."""

import os
import signal
import sys
import traceback
from collections.abc import Callable

from experiment_runs import hosts, settings
from experiment_runs.errors import Stopped, UserError, first_line


def concluded(work: Callable[[], None]) -> int:
    """Runs a command; what goes wrong becomes one message on standard error.

    Returns:
      The exit code: 0; 2 for bad input, a full disk or memory, numbers that are not finite; 130
      after SIGINT, 143 after SIGTERM.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # a terminal that knows ASCII alone
    before = signal.signal(signal.SIGTERM, stop)
    try:
        settings.check()
        work()
        return 0
    except KeyboardInterrupt as error:
        number = getattr(error, "number", signal.SIGINT)
        return told("stopped; the same command goes on from what is saved", 128 + number)
    except (UserError, FloatingPointError) as error:
        return told(str(error), getattr(error, "exit_code", 2))
    except BrokenPipeError:  # who reads the output has gone, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except OSError as error:
        where = error.filename if error.filename is not None else "a file or connection"
        return told(
            f"{where!s:.300}: {error.strerror or error}; see to it, then repeat the command"
        )
    except (MemoryError, ValueError, RuntimeError) as error:
        if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error):
            return told(f"memory is full ({first_line(error)}); lower batch sizes or lengths")
        if hosts.lost(error):
            return told(
                f"another process of this job has ended ({first_line(error)}); repeat the command "
                "on all hosts: it goes on from the last checkpoint"
            )
        raise
    finally:
        signal.signal(signal.SIGTERM, before)


def stop(number: int, frame: object) -> None:
    """A signal's handler that ends the work where it stands."""
    raise Stopped(number)


def told(message: str, code: int = 2) -> int:
    """Prints the message of the error that is being handled; returns the exit code."""
    if settings.debugging():
        traceback.print_exc()
    print(f"error: {message}", file=sys.stderr, flush=True)
    return code

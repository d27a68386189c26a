"""What a command says when it cannot go on, and the exit code that goes with it."""

import contextlib
import os
import sys
from collections.abc import Callable


class InputError(ValueError):
    """Wrong input: one line that names the argument and what is accepted. Exit code 2."""


class RunError(RuntimeError):
    """A run that failed on its way; the line names the last checkpoint. Exit code 3."""


def say(message: str) -> None:
    """One line on stderr; a stream that is closed or full never ends what it watches."""
    with contextlib.suppress(OSError, ValueError):
        print(" ".join(message.splitlines()), file=sys.stderr, flush=True)


WORDS = ("allocate memory", "out of memory", "Storage size calculation overflowed", "multiplication overflow")
"""In a RuntimeError's message, of memory that could not be had."""


def out_of_memory(error: BaseException) -> bool:
    """Whether an exception is of memory that could not be had, on the host or on a device."""
    known = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    return known or (isinstance(error, RuntimeError) and any(w in str(error) for w in WORDS))


def run_command(main: Callable[[], int | None]) -> int:
    """Call `main`; turn the errors above, those of the system, and Ctrl-C into one line on stderr and an exit code."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by the caller
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115  for as long as the process lives
        with contextlib.suppress(AttributeError):
            getattr(sys, name).reconfigure(errors="replace")
    try:
        return main() or 0
    except InputError as error:
        say(f"error: {error}")
        return 2
    except RunError as error:
        say(f"failed: {error}")
        return 3
    except OSError as error:
        say(f"error: {error.strerror or error}{f': {error.filename}' if error.filename else ''}")
        return 2
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        say(f"failed: out of memory ({str(error).splitlines()[0] if str(error) else 'none left'})")
        return 3
    except KeyboardInterrupt:
        say("interrupted")
        return 130

"""What a command says when it cannot go on, and the exit code that goes with it."""

import sys
from collections.abc import Callable


class InputError(ValueError):
    """Wrong input: one line that names the argument and what is accepted. Exit code 2."""


class RunError(RuntimeError):
    """A run that failed on its way; the line names the last checkpoint. Exit code 3."""


def run_command(main: Callable[[], int | None]) -> int:
    """Call `main`; turn the two errors above, and Ctrl-C, into one line on stderr and their exit code."""
    try:
        return main() or 0
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except RunError as error:
        print(f"failed: {error}", file=sys.stderr)
        return 3
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130

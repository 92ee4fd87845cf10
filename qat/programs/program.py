"""What every program does around its one function: flags, log, exit codes.

0: all was done and verified. 2: the user's mistake, one line on stderr. 1: a bug, with traceback.
130: Ctrl-C, 143: SIGTERM (128 + the signal's number, as shells report it), one line on stderr.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Sequence

from absl import app, flags, logging

from qat.errors import QatError

USER_MISTAKE = 2


def run(main: Callable[[], int | None], description: str) -> None:
    """Parses the command line, calls main, and exits.

    Args:
        main: returns None or an exit code; raises a QatError or OSError for a user's mistake.
        description: the text that `--help` begins with.
    """

    def parse(argv: Sequence[str]) -> list[str]:
        if any(arg in ("--help", "-h", "-help") for arg in argv[1:]):
            own = [module for module in flags.FLAGS.flags_by_module_dict() if _is_ours(module)]
            print("\n".join([description, *map(flags.FLAGS.module_help, sorted(own))]))
            sys.exit(0)
        try:
            rest = flags.FLAGS(argv)
        except flags.Error as error:
            _exit_with(error)
        if len(rest) > 1:
            _exit_with(f"unexpected argument {rest[1]!r}; options are written --name=value")
        return rest

    def guarded(_: Sequence[str]) -> int | None:
        logging.set_verbosity(logging.WARNING)  # TFDS says at INFO what it opens
        try:
            return main()
        except QatError as error:
            _exit_with(error)
        except OSError as error:
            _exit_with(f"{error.filename or 'file system'}: {error.strerror or error}")
        except Exception as error:
            _exit_if_of_damaged_data(error)
            raise
        except KeyboardInterrupt as interrupt:
            message = str(interrupt) or "what was written before is kept"
            number = getattr(interrupt, "number", signal.SIGINT)
            print(f"interrupted: {message}", file=sys.stderr)
            sys.exit(128 + number)

    app.run(guarded, flags_parser=parse)


def _is_ours(module: str) -> bool:
    return module.startswith("qat.")


def _exit_if_of_damaged_data(error: Exception) -> None:
    """Data that is streamed is read during a training."""
    from tensorflow.errors import DataLossError  # not for --help

    if isinstance(error, DataLossError):
        reason = error.message.partition("[[")[0]
        _exit_with(f"a record of the dataset cannot be read, prepare it again: {reason}")


def _exit_with(error: object) -> None:
    print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
    sys.exit(USER_MISTAKE)

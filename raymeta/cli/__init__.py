"""The command line. Exit codes: 0 done; 1 the run failed; 2 the input was wrong; 128 + its number, so 130 or 143:
stopped by a signal, after a checkpoint (by a second one: at once). Results go to stdout; progress, logs and errors to
stderr.

Files: `group.py` (the group, and how `section.key=value` is read), `signals.py`, `text.py` (what several commands
print), then the commands: `training.py` (train, fit), `results.py` (evaluate, adapt, report), `stores.py` (data),
`settings.py` (tune, profile, recipes).
"""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Sequence

import click

from raymeta.cli import results, settings, stores, training  # noqa: F401 (each adds its commands to the group)
from raymeta.cli.group import commands
from raymeta.cli.signals import Stopped, StoppedAtOnce
from raymeta.errors import InputError, RunError

EXIT_FAILED, EXIT_INPUT = 1, 2


def main(arguments: Sequence[str] | None = None) -> None:
    """The console script `raymeta`."""
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    sys.exit(run(arguments))


def run(arguments: Sequence[str] | None = None) -> int:
    """The exit code of one command."""
    try:
        commands(arguments, prog_name="raymeta", standalone_mode=False)
        sys.stdout.flush()  # a reader that is gone is met here, not when the interpreter ends
    except click.exceptions.NoArgsIsHelpError as error:
        error.show(sys.stderr)
        return EXIT_INPUT
    except click.ClickException as error:
        context = getattr(error, "ctx", None)
        hint = f" See `{context.command_path} --help`." if context is not None else ""
        print(f"raymeta: {error.format_message()}{hint}", file=sys.stderr)
        return EXIT_INPUT
    except InputError as error:
        print(f"raymeta: {error}", file=sys.stderr)
        return EXIT_INPUT
    except RunError as error:
        print(f"raymeta: {error}", file=sys.stderr)
        return EXIT_FAILED
    except (StoppedAtOnce, KeyboardInterrupt, click.Abort) as error:
        print("raymeta: interrupted; no checkpoint was written for it (earlier ones are kept)", file=sys.stderr)
        # click's Abort stands for a KeyboardInterrupt, its cause; Python's own has no number.
        return 128 + getattr(error.__cause__ or error, "number", signal.SIGINT)
    except Stopped as stopped:
        return 128 + stopped.number
    except BrokenPipeError:  # `raymeta recipes | head`: who read no longer does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_FAILED
    return 0

"""Command lines: parsing arguments, and ending with one line and an exit status instead of a traceback."""

import argparse
import contextlib
import difflib
import os
import signal
import sys
import time

from errors import RunFailed, UserError, exit_status


class Parser(argparse.ArgumentParser):
    """The argument parser of every command. A mistake on the command line raises UserError."""

    def __init__(self, **kwargs):
        super().__init__(allow_abbrev=False, **kwargs)

    def error(self, message):
        raise UserError(f"{message}; see {self.prog} --help")

    def parse_args(self, args=None, namespace=None):
        """Parses options and positional arguments in any order; an unknown option is refused with the nearest known one."""
        parse = self.parse_known_args if self._subparsers else self.parse_known_intermixed_args  # which takes no subcommands
        parsed, unknown = parse(args, namespace)
        if unknown:
            name = unknown[0].partition("=")[0]
            if not name.startswith("-"):
                raise UserError(f"{unknown[0]}: unexpected argument; name files before the options; see {self.prog} --help")
            nearest = difflib.get_close_matches(name, self._options(parsed), n=1)
            hint = f"did you mean {nearest[0]}?" if nearest else f"see {self.prog} --help"
            raise UserError(f"{name}: no such option; {hint}")
        return parsed

    def _options(self, parsed) -> list[str]:
        """Returns the options of this parser and of the subcommand that was parsed, if it has any."""
        commands = [a for a in self._actions if isinstance(a, argparse._SubParsersAction)]
        parsers = [self, *(a.choices[getattr(parsed, a.dest)] for a in commands)]
        return [option for parser in parsers for option in parser._option_string_actions]


def whole(text: str) -> int:
    """Parses a whole number of 0 or more: 40e9 as well as 40000000000. Raises ValueError."""
    try:
        number = int(text)
    except ValueError:
        number = float(text)
    if not 0 <= number < 2**63 or number != int(number):
        raise ValueError
    return int(number)


def run_command(main, argv) -> int:
    """Returns main(argv), an exit status. An expected exception becomes one line on stderr and its own exit status.

    Under torchrun, a UserError or RunFailed is taken to be raised by all ranks of a machine, and the first of them reports it.
    Any other exception, subclasses of these two included, may come from only one rank: that rank reports it, with its number.
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)  # Ctrl-C raises again: files are closed and processes ended
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")  # a file's name need not be UTF-8
    try:
        return main(argv)
    except BaseException as e:
        found = exit_status(e)
        if found is None:
            raise
        status, message = found
        rank = os.environ.get("RANK", "0")
        shared = type(e) in (UserError, RunFailed, KeyboardInterrupt)
        if not shared and os.environ.get("WORLD_SIZE", "1") != "1":
            message = f"rank {rank}: {message}"
        if os.environ.get("LOCAL_RANK", rank) == "0" or not shared:
            print(message, file=sys.stderr, flush=True)
        elif status != 130 and "TORCHELASTIC_RUN_ID" in os.environ:
            wait_for_report()
        return status


@contextlib.contextmanager
def quiet_pipe():
    """Ends the block without an error if stdout is closed, as by `| head`."""
    try:
        yield
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # stdout is flushed once more at exit


def say(*words, end="\n"):
    """Prints at once. If stdout is closed, as by `| head`, this and all later output is dropped without an error."""
    with quiet_pipe():
        print(*words, end=end, flush=True)


def wait_for_report():
    """Waits until torchrun ends this rank, as it does once another has ended: the rank that reports must not be ended first."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    time.sleep(10)


def exit_on_interrupt():
    """Makes Ctrl-C end the process with one line and status 130 until run_command, also while modules are being imported."""

    def interrupted(number, frame):
        os.write(2, b"interrupted\n")
        os._exit(130)

    signal.signal(signal.SIGINT, interrupted)

"""Exceptions that every package raises, and the exit status that each gives a command.

0    done
2    a usage error: one line that names the thing and the remedy
3    a training run was stopped by a signal, after saving
4    the run failed
130  interrupted by Ctrl-C
"""

import contextlib
import errno
import importlib

OUT_OF_MEMORY = ("can't allocate memory", "Storage size calculation overflowed")
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class UserError(ValueError):
    """A usage error. The message is one line that names the thing and the remedy."""


class OutOfMemory(UserError):
    """Something does not fit into memory; the message says what would."""


class RunFailed(RuntimeError):
    """The run cannot continue, for a reason other than a usage error."""


@contextlib.contextmanager
def about(what):
    """Puts `what`, a path or an option, before the message of a UserError that the block raises."""
    try:
        yield
    except UserError as e:
        raise UserError(f"{what}: {e}") from None


def first_line(e: BaseException) -> str:
    """Returns the first line of an exception's message, or its class if it has none."""
    return (str(e).strip() or type(e).__name__).splitlines()[0]


def is_out_of_memory(e: BaseException) -> bool:
    """Returns whether `e` says that a tensor does not fit into memory."""
    return type(e).__name__ in ("OutOfMemoryError", "MemoryError") or any(text in str(e) for text in OUT_OF_MEMORY)


def exit_status(e: BaseException) -> tuple[int, str] | None:
    """Returns the exit status and the one-line message for an expected exception; None for a bug."""
    if isinstance(e, UserError):
        return 2, str(e)
    if isinstance(e, RunFailed):
        return 4, str(e)
    if isinstance(e, KeyboardInterrupt):
        return 130, "interrupted"
    if isinstance(e, OSError):
        message = f"{e.filename}: {e.strerror}" if e.filename else e.strerror or str(e)
        return (4, f"{message}; make room, then run the same command again") if e.errno in DISK_FULL else (2, message)
    if is_out_of_memory(e):
        return 2, "out of memory; try a smaller model or batch, or another machine"
    return None


def require(package: str, what: str, extra: str):
    """Imports and returns a package that only `what` needs. Raises UserError if it is not installed."""
    try:
        return importlib.import_module(package)
    except ModuleNotFoundError:
        raise UserError(f"{what} needs {package}, which is not installed: pip install '.[{extra}]'") from None

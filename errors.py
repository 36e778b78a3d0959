"""Exceptions that every package raises, and the exit status that each stands for."""


class UserError(ValueError):
    """A mistake in what was asked: exit status 2. The message is one line that names the thing and the remedy."""


class RunFailed(RuntimeError):
    """The run cannot go on, through no mistake in what was asked: exit status 4."""

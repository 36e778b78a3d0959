"""Loggers that show a run while it trains, in addition to metrics.jsonl, which stays the source.

A logger is a context manager of (run directory, config, step from which the run continues, rows that it has already, by step)
that yields a function to log a row. It keeps its files in a folder of its name. To add one, name it in LOGGERS and in
`config.log_to`.
"""

import contextlib
import dataclasses
import secrets
from pathlib import Path

from config import Config
from errors import UserError, first_line, require


def check(config: Config):
    """Raises UserError if the package of config.log_to is not installed."""
    if config.log_to != "none":
        require(config.log_to, f"log_to={config.log_to}", config.log_to)


@contextlib.contextmanager
def opened(out: Path, config: Config, step: int, rows: dict[int, dict]):
    """Opens the logger of config.log_to for a run that begins, or is resumed, at `step`. One that the run did not have before
    gets its earlier rows too.
    """
    if config.log_to == "none":
        yield lambda row: None
        return
    known = rows if (out / config.log_to).exists() else {}
    with LOGGERS[config.log_to](out, config, step, known) as log:
        for row in [] if known else rows.values():
            if row["step"] < step:
                log(row)
        yield log


@contextlib.contextmanager
def tensorboard(out: Path, config: Config, step: int, known: dict[int, dict]):
    from torch.utils.tensorboard import SummaryWriter

    # From purge_step on, TensorBoard shows what this process writes in place of what another wrote.
    with SummaryWriter(out / "tensorboard", purge_step=step) as writer:

        def log(row: dict):
            for name, value in numbers(row).items():
                writer.add_scalar(name, value, row["step"])
            writer.flush()

        yield log


@contextlib.contextmanager
def wandb(out: Path, config: Config, step: int, known: dict[int, dict]):
    import wandb

    file = out / "wandb" / "id"
    if not file.exists():
        file.parent.mkdir(exist_ok=True)
        file.write_text(secrets.token_hex(4))
    options = dict(project="copyllama", name=out.name, id=file.read_text(), resume="allow", dir=out)
    try:
        run = wandb.init(config=dataclasses.asdict(config), **options)
    except wandb.Error as e:
        line = first_line(e)
        raise UserError(f"log_to=wandb: {line}; log in with: wandb login, or set WANDB_MODE=offline") from None
    with run:

        def log(row: dict):
            new = {name: value for name, value in numbers(row).items() if name not in known.get(row["step"], {})}
            if new:  # W&B cannot overwrite: skip values already logged before the resume
                run.log(new, step=row["step"])

        yield log


def numbers(row: dict) -> dict:
    return {name: value for name, value in row.items() if isinstance(value, (int, float)) and name != "step"}


LOGGERS = {"tensorboard": tensorboard, "wandb": wandb}

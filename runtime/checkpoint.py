"""One file per checkpoint: tensors and plain values, read by `torch.load(weights_only=True)`, which runs no code.

model              parameter name -> tensor, fp32
optimizer, step    AdamW's state, and how many updates were made (absent from milestones: weights alone)
config             every setting of the run by name
data_fingerprint   which dataset it was trained on
tokenizer          data.vocab's state, so that the file alone turns text into ids
"""

import os
import zipfile
from pathlib import Path

import torch


class CheckpointError(ValueError):
    """A file that cannot be used as a checkpoint. The message is one line."""


def save(path: Path, state: dict):
    """Writes aside, then renames: whoever is killed in between leaves the checkpoint before whole."""
    aside = path.with_name(path.name + ".tmp")
    try:
        with open(aside, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)
    if os.name == "posix":  # the rename is on disk only when its folder is
        folder = os.open(path.parent, os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)


def load(path, device="cpu") -> dict:
    """The checkpoint at `path`: a file, or a run directory, which stands for its ckpt.pt. Raises CheckpointError."""
    path = Path(path)
    path = path / "ckpt.pt" if path.is_dir() else path
    try:
        with zipfile.ZipFile(path) as file:
            damaged = file.testzip()  # torch.load alone accepts a flipped byte
        if damaged:
            raise CheckpointError(f"{path}: damaged: the checksum of {damaged} is wrong; use an older checkpoint")
        state = torch.load(path, map_location=device, weights_only=True)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such checkpoint; train one with: python train.py") from None
    except CheckpointError:
        raise
    except Exception as e:  # whatever an arbitrary file can make zipfile and the unpickler say
        raise CheckpointError(f"{path}: not a checkpoint of this trainer ({type(e).__name__})") from None
    missing = {"model", "step", "config", "tokenizer"} - (state.keys() if isinstance(state, dict) else set())
    if missing:
        raise CheckpointError(f"{path}: not a checkpoint of this trainer: it has no {', '.join(sorted(missing))}")
    return state


def keep(folder: Path, step: int, n: int):
    """Gives the ckpt.pt of `step` a second name, ckpt_<step>.pt, and removes all but the newest n of those."""
    if n > 1:
        kept = folder / f"ckpt_{step}.pt"
        kept.unlink(missing_ok=True)
        os.link(folder / "ckpt.pt", kept)
        steps = sorted(int(path.stem.removeprefix("ckpt_")) for path in folder.glob("ckpt_*.pt"))
        for old in steps[:-n]:
            (folder / f"ckpt_{old}.pt").unlink()


def is_milestone(step: int) -> bool:
    """1, 2, 4 ... 512, then every 1000: dense where abilities form."""
    return step % 1000 == 0 if step > 512 else step > 0 and step & (step - 1) == 0

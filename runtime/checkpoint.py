"""One file per checkpoint: tensors and plain values, read by `torch.load(weights_only=True)`, which runs no code.

model              parameter name -> tensor, fp32
step               how many updates were made
optimizer          AdamW's moments, parameter number -> name -> tensor (absent from milestones: weights alone)
config             every setting of the run by name
data_fingerprint   which dataset it was trained on
tokenizer          data.tokenizer's state, so that the file alone turns text into ids
"""

import os
import shutil
import zipfile
from pathlib import Path

import torch

from errors import UserError


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
    """The checkpoint at `path`: a file, or a run directory, which stands for its ckpt.pt. Raises UserError."""
    path = Path(path)
    path = path / "ckpt.pt" if path.is_dir() else path
    try:
        with zipfile.ZipFile(path) as file:
            damaged = file.testzip()  # torch.load alone accepts a flipped byte
        if damaged:
            raise UserError(f"{path}: damaged: the checksum of {damaged} is wrong; use an older checkpoint")
        state = torch.load(path, map_location=device, weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{path}: no such checkpoint; train one with: python train.py") from None
    except UserError:
        raise
    except Exception as e:  # whatever an arbitrary file can make zipfile and the unpickler say
        raise UserError(f"{path}: not a checkpoint of this trainer ({type(e).__name__})") from None
    kinds = {"config": dict, "model": dict, "step": int, "tokenizer": dict}
    state = state if isinstance(state, dict) else {}
    missing = [name for name, kind in kinds.items() if not isinstance(state.get(name), kind) or state[name] is True]
    if missing:
        raise UserError(f"{path}: not a checkpoint of this trainer: it has no {', '.join(missing)}")
    return state


def restore(path, state: dict, model, optimizer=None):
    """Puts a checkpoint's weights into the model, and its moments into the optimizer, whose settings stay its own. Raises
    UserError where they do not fit.
    """
    try:
        model.load_state_dict(state["model"])
        if optimizer:
            optimizer.load_state_dict(optimizer.state_dict() | {"state": state["optimizer"]})
            for p in model.parameters():
                moments = optimizer.state[p]
                assert moments["exp_avg"].shape == moments["exp_avg_sq"].shape == p.shape and moments["step"].numel() == 1
    except Exception:  # whatever torch says of weights and moments of other shapes, names and kinds
        raise UserError(f"{path}: its weights or moments do not fit its own config") from None


def keep(folder: Path, step: int, n: int):
    """Gives the ckpt.pt of `step` a second name, ckpt_<step>.pt, and removes all but the newest n of those."""
    if n > 1:
        kept = folder / f"ckpt_{step}.pt"
        kept.unlink(missing_ok=True)
        try:
            os.link(folder / "ckpt.pt", kept)
        except OSError:  # a file system without hard links
            shutil.copyfile(folder / "ckpt.pt", kept)
        for old in sorted(folder.glob("ckpt_*.pt"), key=_step)[:-n]:
            old.unlink()


def newest_first(folder: Path) -> list[Path]:
    """The checkpoints in a run directory that a run can go on from: ckpt.pt, then those that were kept."""
    kept = sorted(folder.glob("ckpt_*.pt"), key=_step, reverse=True)
    return [path for path in (folder / "ckpt.pt", *kept) if path.exists()]


def _step(path: Path) -> int:
    return int(path.stem.removeprefix("ckpt_"))


def is_milestone(step: int, every: int) -> bool:
    """1, 2, 4 ... 512, dense where abilities form, and each `every`."""
    return step > 0 and (step % every == 0 or step <= 512 and step & (step - 1) == 0)

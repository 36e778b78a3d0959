"""Checkpoints: one file of tensors and plain values each, which `torch.load(weights_only=True)` reads without running code.

model              parameter name -> tensor, fp32
step               number of updates made
skipped            how many of them were skipped, because their loss or gradient was not finite
overflows          how many were skipped because the loss scale of fp16 was too high
loss_scale         runtime.optim.LossScale's state
optimizer          the optimizer's state: parameter number -> name -> tensor (milestones have none: they hold only weights)
config             every setting of the run by name; `kernels` is the op set that was chosen
data_fingerprint   identifies the dataset
tokenizer          data.tokenizer's state, so that the file alone turns text into ids
"""

import os
import re
import shutil
import zipfile
from pathlib import Path

import torch

from errors import UserError, is_out_of_memory
from files import atomic_writer


def save(path: Path, state: dict):
    """Replaces the checkpoint at `path`. If the process is killed while it writes, the previous checkpoint stays intact."""
    with atomic_writer(path) as file:
        torch.save(state, file)


def load(path) -> dict:
    """Returns the checkpoint at `path`: a file, or a run directory, which stands for its ckpt.pt. Raises UserError."""
    path = Path(path)
    if path.is_dir():
        if not (path / "ckpt.pt").exists():
            raise UserError(f"{path}: holds neither ckpt.pt nor a Hugging Face model")
        path = path / "ckpt.pt"
    try:
        with zipfile.ZipFile(path) as file:
            damaged = file.testzip()  # torch.load alone accepts a flipped byte
        if damaged:
            raise UserError(f"{path}: damaged: the checksum of {damaged} is wrong; use an older checkpoint")
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file or folder") from None
    except UserError:
        raise
    except OSError as e:
        raise UserError(f"{path}: cannot be read: {e.strerror or e}") from None
    except Exception as e:  # whatever an arbitrary file can make zipfile and the unpickler say
        if is_out_of_memory(e):
            raise
        raise UserError(f"{path}: not a checkpoint of this trainer, or damaged or cut short ({type(e).__name__})") from None
    state = state if isinstance(state, dict) else {}
    kinds = {"config": dict, "model": dict, "step": int, "tokenizer": dict}
    later = {"skipped": int, "overflows": int, "loss_scale": torch.Tensor, "kernels": str}  # which older checkpoints lack
    kinds |= {name: kind for name, kind in later.items() if name in state}
    missing = [name for name, kind in kinds.items() if not isinstance(state.get(name), kind) or state[name] is True]
    if missing:
        raise UserError(f"{path}: not a checkpoint of this trainer: it has no {', '.join(missing)}")
    return state


def restore(path, state: dict, model, optimizer=None, loss_scale=None):
    """Loads a checkpoint's weights into the model, and its moments and loss scale into `optimizer` and `loss_scale` if given.
    The optimizer keeps its own learning rate, weight decay and betas.

    A model on the meta device takes the tensors themselves, in their dtype, so that they are in memory only once. Raises
    UserError if they do not fit.
    """
    try:
        model.load_state_dict(state["model"], assign=next(model.parameters()).is_meta)
        if loss_scale and "loss_scale" in state:
            loss_scale.load_state(state["loss_scale"])
        if optimizer and state["step"]:  # before the first update there are no moments
            optimizer.load_state_dict(optimizer.state_dict() | {"state": state["optimizer"]})
            for group in optimizer.param_groups:
                names = {"momentum"} if group.get("muon") else {"step", "exp_avg", "exp_avg_sq"}
                for p in group["params"]:
                    assert optimizer.state[p].keys() == names
                    assert all(optimizer.state[p][name].shape == p.shape for name in names - {"step"})
                    assert "step" not in names or optimizer.state[p]["step"].numel() == 1
    except Exception as e:  # whatever torch says of weights and moments of other shapes, names and kinds
        if is_out_of_memory(e):
            raise
        raise UserError(
            f"{path}: weights or optimizer state do not match the model in its config; use an older checkpoint"
        ) from None


def keep(folder: Path, step: int, n: int):
    """Gives the ckpt.pt of `step` a second name, ckpt_<step>.pt, and removes all but the newest n of those; all if n is 1."""
    if n > 1:
        kept = folder / f"ckpt_{step}.pt"
        kept.unlink(missing_ok=True)
        try:
            os.link(folder / "ckpt.pt", kept)
        except OSError:  # a file system without hard links
            with atomic_writer(kept) as copy, open(folder / "ckpt.pt", "rb") as original:
                shutil.copyfileobj(original, copy)
    by_age = list(by_step(folder).values())
    for old in by_age[:-n] if n > 1 else by_age:
        old.unlink()


def by_step(folder: Path, kind="ckpt") -> dict[int, Path]:
    """Returns the files <kind>_<step>.pt of a run directory by step, in order; kind is ckpt or milestone."""
    matches = [(re.fullmatch(rf"{kind}_(\d+)\.pt", path.name), path) for path in Path(folder).glob(f"{kind}_*.pt")]
    return dict(sorted((int(match[1]), path) for match, path in matches if match))


def newest_first(folder: Path) -> list[Path]:
    """Returns the checkpoints of a run directory that a run can resume from: ckpt.pt, then those that were kept."""
    kept = reversed(by_step(folder).values())
    return [path for path in (folder / "ckpt.pt", *kept) if path.exists()]


def is_milestone(step: int, every: int) -> bool:
    """Returns whether `step` is 1, 2, 4 ... 512, dense where abilities form, or a multiple of `every`."""
    return step > 0 and (step % every == 0 or step <= 512 and step & (step - 1) == 0)


def n_milestones(last: int, every: int) -> int:
    """Returns how many of the steps 1 .. last are milestones."""
    return last // every + sum(2**i <= last and 2**i % every > 0 for i in range(10))

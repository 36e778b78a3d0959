"""Resumes a run from its newest checkpoint, or starts one from the weights of another model."""

import dataclasses
import os
from pathlib import Path

import config as settings
from config import Config
from errors import UserError, about
from runtime import checkpoint, rundir

MAY_DIFFER = {"seq_len", "attn_dropout"}  # from the source of init_from: they do not change what the weights compute


def newest(config: Config, fingerprint: str, world) -> tuple[Path | None, dict]:
    """Returns the path and state of the checkpoint that this run resumes; None and {} for a new run.

    A run that torchrun restarts resumes its own newest checkpoint. Raises UserError if the checkpoint is of another run.
    """
    if not config.resume:  # an unset variable of a shell
        raise UserError("resume=: expected auto, none or a checkpoint file")
    out, given = Path(config.out_dir), Path(config.resume)
    paths = checkpoint.newest_first(out)
    if config.resume != "auto" and not (paths and rundir.is_restarted(out, "begun")):
        paths = [] if config.resume == "none" else [given / "ckpt.pt" if given.is_dir() else given]
    if not paths:
        return None, {}
    for i, path in enumerate(paths):
        try:
            state = checkpoint.load(path)
            break
        except UserError as e:
            if path == paths[-1]:
                raise UserError(f"{e}; start anew with --resume=none" if config.resume == "auto" else str(e)) from None
            world.say(f"warning: {e}; taking {paths[i + 1]}")
    check(path, state, config, fingerprint)
    return path, state


def check(path: Path, state: dict, config: Config, fingerprint: str):
    """Raises UserError if the checkpoint is not one that a run with these settings and this data may resume."""
    if "optimizer" not in state:
        raise UserError(f"{path}: a milestone holds only weights; resume from a ckpt.pt, or pass --init_from")
    source = state["config"].get("init_from") or ""
    if config.init_from and os.path.realpath(config.init_from) != os.path.realpath(str(source)):
        raise UserError(
            f"init_from={config.init_from}: {path} has init_from={source!r}; leave it out to resume, name another --out_dir, "
            "or start anew with --resume=none"
        )
    different = settings.changed(state["config"], config)
    free = settings.MAY_CHANGE | (settings.MAY_CHANGE_ON_REQUEST if config.allow_changes else set())
    free |= {"dtype"} if config.dtype == "auto" else set()  # which then is the checkpoint's
    refused = {name: values for name, values in different.items() if name not in free}
    changed = [f"{name} {then} -> {now}" for name, (then, now) in refused.items()]
    if is_other_data := state.get("data_fingerprint") != fingerprint:
        changed.append(f"the data in {config.data}")
    if changed:
        on_request = refused.keys() <= settings.MAY_CHANGE_ON_REQUEST and not is_other_data
        allow = "pass --allow_changes=true to change them from here on, " if on_request else ""
        raise UserError(
            f"{path}: made with other settings: {', '.join(changed)}; {allow}set them back, name another --out_dir, or start "
            "anew with --resume=none"
        )
    if state["step"] < config.max_steps and rundir.holds(Path(config.out_dir), path):
        kept = len(checkpoint.by_step(path.parent))
        then = different.get("ckpt_keep", (0,))[0] or 0  # 0: as now, or not recorded
        if config.ckpt_keep < min(then, kept):
            raise UserError(
                f"ckpt_keep={config.ckpt_keep}: {config.out_dir} holds {kept} checkpoints, kept with ckpt_keep={then}; pass "
                f"--ckpt_keep={then}, or remove them"
            )


def changes(path: Path, state: dict, config: Config, kernels: str, recorded: dict, world) -> dict:
    """Reports a resume, and changes of the op set, of its tiles and of settings that later learning rates or updates depend on.

    Returns what metrics.jsonl records of these settings: {name: [value then, value now]}. recorded: what an earlier resume at
    the same step recorded; what it changed to other values than today's never took effect.
    """
    world.say(f"resuming {path} at step {state['step']}")
    different = settings.changed(state["config"], config)
    then = state.get("kernels") or state["config"].get("kernels")  # older checkpoints record only the op set, or `auto`
    if then not in ("auto", kernels, None if "kernels" in state else config.kernels):
        world.say(f"warning: {then} kernels made this checkpoint; the run continues with {kernels}, which rounds differently")
    names = settings.MAY_CHANGE_ON_REQUEST | ({"max_steps"} if config.schedule != "constant" else set())
    changed = {name: list(different[name]) for name in names & different.keys()}
    for name, (before, now) in sorted(changed.items()):
        world.say(f"changed from here on: {name} {before} -> {now}")
    return {name: values for name, values in recorded.items() if values[1] == getattr(config, name, None)} | changed


def start_from(path, state: dict, config: Config, model, tokenizer, world):
    """Copies the weights of `state`, loaded from `path`, into a new run's model.

    Raises UserError if the two models differ in settings other than MAY_DIFFER. Warns if the tokenizer of the source is not
    that of the data, because the same ids then stand for other text.
    """
    with about(path):
        theirs = dataclasses.asdict(settings.from_checkpoint(state["config"]))
        values = {name: value for name, value in theirs.items() if name not in MAY_DIFFER}
        dataclasses.replace(config, **values)  # raises for what no run can train, such as ids beyond uint16
    if other := {name: value for name, value in values.items() if value != getattr(config, name)}:
        mine = ", ".join(f"{name}={getattr(config, name)}" for name in other)
        wanted = " ".join(f"--{name}={str(value).lower()}" for name, value in other.items())
        raise UserError(f"{mine}, but init_from={path} has {', '.join(map(str, other.values()))}; pass {wanted}")
    checkpoint.restore(path, state, model)
    world.say(f"starting from the weights of {path}, step {state['step']} there")
    source = {name: value for name, value in state["tokenizer"].items() if name != "counts"}
    if "ids" not in (tokenizer.kind, source.get("kind")) and source != tokenizer.values():
        world.say(f"warning: the tokenizer of {path} is not that of {config.data}: the same ids stand for other text")

"""When a run evaluates, saves and logs."""

from config import Config
from runtime.checkpoint import is_milestone


def due_after(step: int, c: Config) -> set[str]:
    """Returns which of validate, copy, milestone, save and log happen after `step` updates.

    All but milestones happen after the last update too, unless their interval is 0.
    """
    intervals = {"validate": c.eval_interval, "copy": c.copy_eval_interval, "save": c.ckpt_interval, "log": c.log_interval}
    due = {name for name, interval in intervals.items() if interval and (step % interval == 0 or step == c.max_steps)}
    if step == 0:
        return due & {"validate"}
    if c.ckpt_milestones and is_milestone(step, c.milestone_interval):
        due.add("milestone")
    # Saving waits for the updates that are queued on a GPU. Reading the statistics first attributes that time to the updates.
    if step == 1 or due & {"validate", "copy", "save", "milestone"}:
        due.add("log")
    return due

import pytest

from config import Config
from runtime.schedule import due_after


@pytest.mark.parametrize("name", ["eval_interval", "copy_eval_interval", "ckpt_interval", "milestone_interval"])
def test_steps_that_make_the_host_wait_for_the_device_are_log_steps(name):
    """Otherwise the wait for the updates since the last log step would be left out of their time."""
    never = dict(eval_interval=0, copy_eval_interval=0, ckpt_interval=10**6, milestone_interval=10**6, log_interval=10**6)
    config = Config(**never | {name: 30}, ckpt_milestones=name == "milestone_interval")
    assert "log" in due_after(30, config) and "log" not in due_after(31, config)


def test_the_last_update_is_evaluated_and_saved_whatever_the_intervals():
    config = Config(max_steps=25, eval_interval=10, copy_eval_interval=10, ckpt_interval=10, log_interval=10)
    assert due_after(25, config) == {"validate", "copy", "save", "log"}
    assert due_after(24, config) == set()
    never = Config(max_steps=25, eval_interval=0, copy_eval_interval=0)
    assert due_after(25, never) == {"save", "log"}

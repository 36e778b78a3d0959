import os
import pickle
import zipfile

import pytest
import torch

from errors import UserError
from runtime import checkpoint

STATE = {
    "model": {"w": torch.arange(1000.0)},
    "step": 7,
    "config": {"dim": 1, "data": "x"},
    "tokenizer": {"kind": "sentencepiece", "model": bytes(range(256))},
}


def test_what_is_saved_is_what_loads(tmp_path):
    checkpoint.save(tmp_path / "ckpt.pt", STATE)
    for path in (tmp_path, tmp_path / "ckpt.pt"):
        state = checkpoint.load(path)
        assert torch.equal(state.pop("model")["w"], STATE["model"]["w"])
        assert state == {k: v for k, v in STATE.items() if k != "model"}
    assert os.listdir(tmp_path) == ["ckpt.pt"]


def test_a_failed_save_leaves_the_previous_checkpoint(tmp_path):
    checkpoint.save(tmp_path / "ckpt.pt", STATE)
    before = (tmp_path / "ckpt.pt").read_bytes()
    with pytest.raises(Exception, match="pickle"):
        checkpoint.save(tmp_path / "ckpt.pt", STATE | {"bad": lambda: 0})
    assert (tmp_path / "ckpt.pt").read_bytes() == before and os.listdir(tmp_path) == ["ckpt.pt"]


def test_a_file_that_is_no_checkpoint_is_refused_in_one_line(tmp_path):
    path = tmp_path / "x.pt"
    cases = {"text": b"hello", "empty": b"", "pickle": pickle.dumps({"model": 1})}
    for data in cases.values():
        path.write_bytes(data)
        with pytest.raises(UserError, match=r"x.pt: not a checkpoint"):
            checkpoint.load(path)
    torch.save({"a": 1}, path)
    with pytest.raises(UserError, match="it has no config, model, step, tokenizer$"):
        checkpoint.load(path)
    torch.save([1], path)
    with pytest.raises(UserError, match="it has no"):
        checkpoint.load(path)
    with pytest.raises(UserError, match="nothing.pt: no such file or folder$"):
        checkpoint.load(tmp_path / "nothing.pt")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="empty: holds neither ckpt.pt nor a Hugging Face model$"):
        checkpoint.load(tmp_path / "empty")


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root reads every file")
def test_an_unreadable_file_is_reported(tmp_path):
    checkpoint.save(tmp_path / "ckpt.pt", STATE)
    (tmp_path / "ckpt.pt").chmod(0)
    with pytest.raises(UserError, match="ckpt.pt: cannot be read: Permission denied"):
        checkpoint.load(tmp_path)


def test_a_disk_error_is_not_reported_as_a_file_of_another_kind(tmp_path, monkeypatch):
    checkpoint.save(tmp_path / "ckpt.pt", STATE)

    def fail(*_, **__):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(checkpoint.zipfile, "ZipFile", fail)
    with pytest.raises(UserError, match="ckpt.pt: cannot be read: Input/output error"):
        checkpoint.load(tmp_path)


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory")], ids=repr)
def test_out_of_memory_is_not_reported_as_damage(tmp_path, monkeypatch, error):
    checkpoint.save(tmp_path / "ckpt.pt", STATE)

    def fail(*_, **__):
        raise error

    monkeypatch.setattr(torch.nn.Linear, "load_state_dict", fail)
    with pytest.raises(type(error)) as restoring:
        checkpoint.restore("x", STATE, torch.nn.Linear(1, 1))
    monkeypatch.setattr(torch, "load", fail)
    with pytest.raises(type(error)) as loading:
        checkpoint.load(tmp_path)
    assert not isinstance(restoring.value, UserError) and not isinstance(loading.value, UserError)


def test_files_of_other_names_are_no_checkpoints_of_a_step(tmp_path):
    for name in ("ckpt.pt", "ckpt_10.pt", "ckpt_9.pt", "ckpt_best.pt", "ckpt_7.pt.bak", "milestone_8.pt", "ckpt_-1.pt"):
        (tmp_path / name).touch()
    assert [path.name for path in checkpoint.newest_first(tmp_path)] == ["ckpt.pt", "ckpt_10.pt", "ckpt_9.pt"]
    assert list(checkpoint.by_step(tmp_path, "milestone")) == [8]


def test_a_flipped_byte_and_a_cut_file_are_refused(tmp_path):
    path = tmp_path / "ckpt.pt"
    checkpoint.save(path, STATE)
    whole = path.read_bytes()
    with zipfile.ZipFile(path) as file:
        info = max(file.infolist(), key=lambda i: i.file_size)
    at = whole.index(STATE["model"]["w"].numpy().tobytes()) + 100
    path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
    assert torch.load(path, weights_only=True)["step"] == 7  # torch itself does not notice
    with pytest.raises(UserError, match=info.filename):
        checkpoint.load(path)
    path.write_bytes(whole[:-10])
    with pytest.raises(UserError, match="not a checkpoint"):
        checkpoint.load(path)


def test_loading_runs_no_code(tmp_path):
    class Hostile:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    torch.save(STATE | {"model": Hostile()}, tmp_path / "x.pt")
    with pytest.raises(UserError):
        checkpoint.load(tmp_path / "x.pt")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("links", [True, False])
def test_the_newest_n_are_kept(tmp_path, monkeypatch, links):
    if not links:
        monkeypatch.setattr(os, "link", lambda *_: os.stat("/no/such/file"))
    for step in range(1, 6):
        checkpoint.save(tmp_path / "ckpt.pt", STATE | {"step": step})
        checkpoint.keep(tmp_path, step, 2)
    assert sorted(os.listdir(tmp_path)) == ["ckpt.pt", "ckpt_4.pt", "ckpt_5.pt"]
    steps = [checkpoint.load(tmp_path / name)["step"] for name in ("ckpt.pt", "ckpt_4.pt", "ckpt_5.pt")]
    assert steps == [5, 4, 5]
    checkpoint.keep(tmp_path, 5, 1)
    assert os.listdir(tmp_path) == ["ckpt.pt"]


def test_milestones_are_powers_of_two_then_thousands():
    powers = [1, 2, 4, 8, 16, 32, 64, 128, 256, 512]
    assert [s for s in range(3001) if checkpoint.is_milestone(s, 1000)] == [*powers, 1000, 2000, 3000]
    assert [s for s in range(1001) if checkpoint.is_milestone(s, 400)] == sorted([*powers, 400, 800])
    for every in (1, 2, 3, 64, 400, 1000):
        for last in (0, 1, 5, 64, 511, 512, 513, 2000):
            counted = sum(checkpoint.is_milestone(step, every) for step in range(last + 1))
            assert checkpoint.n_milestones(last, every) == counted, (last, every)

"""Which rank reports an error."""

import pytest

from cli import run_command
from data import bins
from errors import OutOfMemory, RunFailed, UserError


def reported(monkeypatch, capsys, error, **environment) -> str:
    """Returns what a process with these variables prints when a command raises `error`."""

    def fail(argv):
        raise error

    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert run_command(fail, []) in (2, 4)
    return capsys.readouterr().err


@pytest.mark.parametrize("kind", [UserError, RunFailed])
def test_an_error_of_all_ranks_is_reported_by_the_first_rank_of_each_machine(monkeypatch, capsys, kind):
    assert reported(monkeypatch, capsys, kind("why")) == "why\n"
    for rank, local, expected in (("0", "0", "why\n"), ("1", "1", ""), ("8", "0", "why\n"), ("9", "1", "")):
        assert reported(monkeypatch, capsys, kind("why"), RANK=rank, LOCAL_RANK=local, WORLD_SIZE="16") == expected


@pytest.mark.parametrize("kind", [OutOfMemory, bins.DataChanged, bins.UnknownId])
def test_an_error_that_one_rank_alone_may_meet_is_reported_by_that_rank(monkeypatch, capsys, kind):
    assert reported(monkeypatch, capsys, kind("why")) == "why\n"
    assert reported(monkeypatch, capsys, kind("why"), RANK="9", LOCAL_RANK="1", WORLD_SIZE="16") == "rank 9: why\n"


def test_a_bin_raises_errors_that_one_rank_alone_may_meet(dataset, tmp_path):
    data = tmp_path / "set"
    data.mkdir()
    for name in ("train.bin", "meta.json"):
        (data / name).write_bytes((dataset / name).read_bytes())
    with pytest.raises(bins.UnknownId, match="vocab_size=3"):
        bins.Bin(data / "train.bin", 31, 3).windows([0])
    opened = bins.Bin(data / "train.bin", 31, 17)
    (data / "train.bin").write_bytes(b"")
    with pytest.raises(bins.DataChanged, match="changed since this run opened it"):
        opened.windows([0])

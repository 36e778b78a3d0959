import json
from pathlib import Path

import numpy as np
import pytest
import torch

import train
from config import from_dict
from data.bins import Bin, fingerprint
from data.meta import load_meta
from data.prepare import prepare
from data.tokenizer import load_tokenizer
from errors import UserError
from runtime import distributed, metrics
from tests.test_data_bins import headed, plain
from tests.test_data_tokenizer import TOKENS, ranks

SIZES = {"train": 3000, "val": 500}


@pytest.fixture(params=["nanoGPT", "llama2.c", "modded-nanogpt"])
def folder(request, tmp_path):
    """Bins as others write them, with id 256 between documents of 20 tokens; and the tokens of each split."""
    rng = np.random.default_rng(0)
    tokens = {split: np.where(np.arange(n) % 20 == 0, 256, rng.integers(256, size=n)) for split, n in SIZES.items()}
    folder = tmp_path / "others"
    folder.mkdir()
    if request.param == "nanoGPT":
        for split in SIZES:
            plain(folder / f"{split}.bin", tokens[split])
    elif request.param == "llama2.c":
        plain(folder / "data00.bin", tokens["val"])
        for i, part in enumerate(np.array_split(tokens["train"], 3), 1):
            plain(folder / f"data{i:02}.bin", part)
    else:
        headed(folder / "fineweb_val_000000.bin", tokens["val"])
        for i, part in enumerate(np.array_split(tokens["train"], 3), 1):
            headed(folder / f"fineweb_train_{i:06}.bin", part)
    return folder, tokens


def test_bins_of_other_programs_get_a_meta_json_that_describes_them(folder, capsys):
    folder, tokens = folder
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    prepare(["from-bin", str(folder), "--tokenizer=bytes"])
    meta = load_meta(folder)
    assert {split: meta["splits"][split]["tokens"] for split in SIZES} == SIZES
    assert {split: meta["splits"][split]["docs"] for split in SIZES} == {"train": 150, "val": 25}
    assert meta["counts"] == np.bincount(tokens["train"], minlength=257).tolist()
    assert load_tokenizer(folder).counts.tolist() == meta["counts"]
    assert meta["vocab_size"] == 257 and load_tokenizer(folder).decode(b"abc") == "abc"
    assert {p.name: p.read_bytes() for p in folder.iterdir() if p.name in before} == before
    for split in SIZES:
        bin = Bin(folder / f"{split}.bin", 10, 257)
        assert bin.windows([7])[0].tolist() == tokens[split][70:81].tolist()
    assert "train 3,000 tokens, val 500 tokens, vocab_size 257 (bytes)" in capsys.readouterr().out


def test_a_run_trains_on_them_with_a_meta_json_and_without(folder, settings):
    folder, _ = folder
    losses = []
    for name in ("without", "with"):
        config = from_dict(settings | {"data": str(folder), "vocab_size": 257, "out_dir": f"{settings['out_dir']} {name}"})
        assert train.train(config, distributed.World(0, 1, torch.device("cpu"))) == 0
        losses.append([row["loss"] for row in metrics.read(Path(config.out_dir) / "metrics.jsonl") if "loss" in row])
        if name == "without":
            prepare(["from-bin", str(folder), "--tokenizer=bytes"])
    assert losses[0] == losses[1] and len(losses[0]) == 6


def test_the_same_tokens_have_one_fingerprint_however_they_are_cut(tmp_path):
    for name, cuts in (("one", []), ("many", [100, 900])):
        (tmp_path / name).mkdir()
        for i, part in enumerate(np.split(np.arange(1000) % 256, cuts)):
            headed(tmp_path / name / f"a_train_{i}.bin", part)
        plain(tmp_path / name / "val.bin", range(50))
        prepare(["from-bin", str(tmp_path / name)])
    assert fingerprint(tmp_path / "one") == fingerprint(tmp_path / "many")


def test_the_tokenizer_lies_beside_them_or_is_unknown(folder, tmp_path):
    folder, _ = folder
    (tmp_path / "gpt.tiktoken").write_bytes(ranks(TOKENS))
    prepare(["from-bin", str(folder), f"--tokenizer={tmp_path / 'gpt.tiktoken'}"])
    assert load_tokenizer(folder).kind == "tiktoken" and load_tokenizer(folder).decode([65, 66]) == "AB"
    with pytest.raises(UserError, match="has a meta.json already"):
        prepare(["from-bin", str(folder)])
    (folder / "meta.json").unlink()
    prepare(["from-bin", str(folder)])
    assert json.loads((folder / "meta.json").read_text())["tokenizer"] == {"kind": "ids", "size": 257}


def test_another_tokenizer_beside_them_is_not_overwritten(folder, tmp_path):
    folder, _ = folder
    (tmp_path / "gpt.tiktoken").write_bytes(ranks(TOKENS))
    (folder / "tokenizer.tiktoken").write_text("mine")
    with pytest.raises(UserError, match="tokenizer.tiktoken: is another tokenizer; pass --tokenizer=.*, or move the file away"):
        prepare(["from-bin", str(folder), f"--tokenizer={tmp_path / 'gpt.tiktoken'}"])
    assert (folder / "tokenizer.tiktoken").read_text() == "mine" and not (folder / "meta.json").exists()


def test_a_folder_that_is_no_dataset_is_refused_and_nothing_is_written(tmp_path):
    def refused(message, *argv):
        before = sorted(tmp_path.iterdir())
        with pytest.raises(UserError, match=message) as e:
            prepare(["from-bin", str(tmp_path), *argv])
        assert "\n" not in str(e.value) and sorted(tmp_path.iterdir()) == before

    refused("no file of train tokens")
    plain(tmp_path / "train.bin", range(300))
    refused("no file of val tokens; its name must have 'val' in it")
    plain(tmp_path / "val.bin", range(30))
    refused("token id 299, but bytes has only 257 ids", "--tokenizer=bytes")
    headed(tmp_path / "val.bin", range(30), stated=31)
    refused("header states 31 tokens, but it holds 30")

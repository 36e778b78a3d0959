"""sample.py: what is drawn, how it is decoded while it comes, and its command line."""

import io
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

import sample
from cli import run_command
from config import ROOT
from data.tokenizer import Bytes, Chars, Ids, SentencePiece
from tests.handbuilt import induction_model
from tests.test_eval_copy import save, small_model

TEXT = "naïve 中文 🙂 e\u0301nd"


def generating(ids, seq_len=100):
    """A stand-in for a model that generates these ids whatever the prompt is."""
    return SimpleNamespace(
        config=SimpleNamespace(seq_len=seq_len),
        embed=SimpleNamespace(weight=torch.zeros(1)),
        generate=lambda tokens, n, *_: (torch.tensor([i]) for i in ids[:n]),
    )


@torch.no_grad()
def test_top_k_draws_from_the_softmax_over_the_k_likeliest_tokens():
    model, n = small_model(Chars(20), seq_len=8), 20000
    prompt = torch.tensor([[3, 1, 4]])
    torch.manual_seed(0)
    draws = next(model.generate(prompt.expand(n, 3), 1, temperature=3.0, top_k=5))
    logits = model(prompt)[0, -1] / 3
    p = torch.zeros(21)
    p[logits.topk(5).indices] = logits.topk(5).values.softmax(-1)
    share = torch.bincount(draws, minlength=21) / n
    assert ((share - p).abs() <= 5 * (p / n) ** 0.5).all()  # 5 standard errors; 0 outside of the k
    torch.manual_seed(0)  # more than the vocabulary has is all of it
    assert torch.equal(next(model.generate(prompt.expand(n, 3), 1, 3.0, top_k=99)), next_of_seed_0(model, prompt.expand(n, 3)))


def next_of_seed_0(model, prompt):
    torch.manual_seed(0)
    return next(model.generate(prompt, 1, 3.0))


@pytest.mark.parametrize("kind", ["bytes", "bpe"])
def test_no_piece_holds_part_of_a_character_and_together_they_are_the_text(kind, request):
    tokenizer = Bytes() if kind == "bytes" else SentencePiece(request.getfixturevalue("bpe"))
    ids = list(map(int, tokenizer.encode(TEXT)))
    pieces = list(sample.decoded(tokenizer, ids))
    assert "".join(pieces) == TEXT and len(pieces) == len(ids) + 1 and not any("\ufffd" in piece for piece in pieces)
    assert len(ids) > len(TEXT)  # so that some characters take several ids
    before = list(map(int, tokenizer.encode("on 中")))
    whole = tokenizer.decode(before + ids)
    assert tokenizer.decode(before) + "".join(sample.decoded(tokenizer, ids, before)) == whole


def test_bytes_that_are_no_character_come_once_it_is_certain_that_they_are_none():
    broken, zhong = "中".encode()[:2], "中".encode()
    assert list(sample.decoded(Bytes(), broken + b"a")) == ["", "", "\ufffda", ""]
    assert list(sample.decoded(Bytes(), b"a" + broken)) == ["a", "", "", "\ufffd"]
    assert list(sample.decoded(Bytes(), broken[:1] + zhong)) == ["", "", "", "\ufffd中", ""]


@pytest.mark.parametrize("end", ["bos", "eos", "another special token"])
def test_a_continuation_ends_with_the_document(end):
    tokenizer = Bytes()
    if end == "eos":
        tokenizer.eos = 10
    elif end != "bos":
        tokenizer.special = {256, 11}
    stop = getattr(tokenizer, end, 11)
    assert "".join(sample.stream(generating([*b"abc", stop, *b"def"]), tokenizer, "x")) == "abc"
    assert "".join(sample.stream(generating(b"abcdef"), tokenizer, "x", n=4)) == "abcd"


def test_each_piece_is_printed_before_the_next_token_is_drawn(capsys):
    printed = []

    def generate(tokens, n, *_):
        for i in b"abc":
            printed.append(capsys.readouterr().out)
            yield torch.tensor([i])

    model = generating([])
    model.generate = generate
    sample.write_samples(model, Bytes(), "x")
    assert printed == ["x", "a", "b"] and capsys.readouterr().out == "c\n"


def test_the_command_draws_the_same_text_for_the_same_seed(tmp_path, capsys, monkeypatch):
    tokenizer = Chars(20)
    save(tmp_path / "ckpt.pt", small_model(tokenizer), tokenizer)

    def output(*argv):
        assert sample.main([str(tmp_path), *argv]) == 0
        return capsys.readouterr().out

    draws = output("--prompt=abc", "--num_samples=3", "--max_new_tokens=20", "--temperature=4")
    one, two, three = (text.removesuffix("\n") for text in draws.split("-" * 15 + "\n"))
    assert len({one, two, three}) == 3 and all(text.startswith("abc") and len(text) <= 23 for text in (one, two, three))
    assert draws == output("--prompt=abc", "--num_samples=3", "--max_new_tokens=20", "--temperature=4", "--seed=0")
    assert draws != output("--prompt=abc", "--num_samples=3", "--max_new_tokens=20", "--temperature=4", "--seed=1")
    greedy = output("--prompt=abc", "--temperature=0")
    assert greedy == output("--prompt=abc", "--temperature=1e-40")
    assert greedy == output("--prompt=abc", "--top_k=1") and len(greedy) <= 96
    monkeypatch.setattr(sys, "stdin", io.StringIO("abc"))
    assert greedy == output("--prompt=-", "--temperature=0")
    assert len(output()) > 1  # without a prompt a document begins


def test_the_command_continues_what_the_hand_built_model_copies(tmp_path):
    tokenizer = Chars(64)
    save(tmp_path / "ckpt.pt", induction_model(tokenizer.size, 256, tokenizer.bos)[0], tokenizer)
    text = "the quick brown fox jumps. the qui"
    command = [sys.executable, "sample.py", str(tmp_path), "--prompt", text, "--max_new_tokens=20"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, text + "ck brown fox jumps. \n", "")


def test_a_prompt_that_is_not_utf_8_ends_with_status_2_and_one_line(tmp_path, capsys, monkeypatch):
    save(tmp_path / "ckpt.pt", small_model(Chars(20)), Chars(20))
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"a\xff"), encoding="utf-8"))
    for prompt in ("-", "a\udcff"):  # Python's form of a byte that an argument holds
        assert run_command(sample.main, [str(tmp_path), "--prompt", prompt]) == 2
        assert re.fullmatch("(--)?prompt.*not valid UTF-8\n", capsys.readouterr().err)


def test_each_mistake_ends_with_status_2_and_one_line(tmp_path, capsys):
    save(tmp_path / "ckpt.pt", small_model(Chars(20)), Chars(20))
    save(tmp_path / "ids.pt", small_model(Ids(24)), Ids(24))
    cases = [
        (["none.pt"], "none.pt: no such file or folder"),
        (["ckpt.pt", "--prompt=A"], "character 'A'"),
        (["ckpt.pt", "--prompt", "a" * 96], "prompt of 97 tokens: this model's context takes 1 to 95"),
        (["ids.pt"], "an empty prompt cannot be continued"),
        (["ckpt.pt", "--temperature=-1"], "--temperature=-1.0: expected 0 or more"),
        (["ckpt.pt", "--temperature=nan"], "--temperature=nan: expected 0 or more"),
        (["ckpt.pt", "--top_k=-1"], "--top_k=-1"),
        (["ckpt.pt", "--seeds=1"], "did you mean --seed?"),
    ]
    for (name, *args), words in cases:
        assert run_command(sample.main, [str(tmp_path / name), *args]) == 2
        error = capsys.readouterr().err
        assert words in error and len(error.strip().splitlines()) == 1

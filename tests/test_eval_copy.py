import dataclasses
import json
import subprocess
import sys

import numpy as np
import pytest
import torch

import eval_copy
from data.vocab import Bytes, Chars, Ids
from kernels import eager
from model import Llama, LlamaConfig
from runtime import checkpoint
from runtime.config import ROOT, Config, ConfigError
from tests.handbuilt import induction_model, uniform_model


def small_model(words, seq_len=96, seed=0):
    torch.manual_seed(seed)
    shape = LlamaConfig(dim=32, n_layers=2, n_heads=4, n_kv_heads=2, hidden_dim=32, vocab_size=words.size, seq_len=seq_len)
    model = Llama(shape, eager).eval()
    with torch.no_grad():
        for p in model.parameters():
            p *= 8 if p.dim() > 1 else 1  # so that its predictions differ from place to place
    return model


def save(path, model, words, step=3):
    config = Config(**dataclasses.asdict(model.config))
    state = {"model": model.state_dict(), "step": step, "config": dataclasses.asdict(config), "tokenizer": words.state()}
    checkpoint.save(path, state)


def test_the_hand_built_induction_model_scores_1_and_its_two_heads_are_found():
    words = Bytes()
    model, previous, induction = induction_model(words.size, 1024, words.bos)
    test = eval_copy.make_test(words, "full", 1024, samples=20)
    scores = eval_copy.copy_scores(model, test)
    assert scores["exact"] == scores["token"] == scores["first"] == 1.0 and scores["queries"] == 200
    assert scores["exact_by_sequence"] == {i: 1.0 for i in range(5, 51, 5)}
    heads = eval_copy.head_scores(model, words)
    for name, head in (("induction", induction), ("previous", previous)):
        found = np.array(heads[name])
        assert np.unravel_index(found.argmax(), found.shape) == head and found[head] > 0.95
        found[head] = 0
        assert found.max() < 0.5


def test_the_induction_range_as_printed_counts_one_place_with_nothing_to_induce():
    """The last token of the first copy is followed by nothing yet: a perfect head gets (s - 2) / (s - 1) of its score."""
    words = Bytes()
    model, _, induction = induction_model(words.size, 256, words.bos)
    heads = eval_copy.head_scores(model, words)
    mended, printed = (np.array(heads[name])[induction] for name in ("induction", "induction_paper"))
    assert printed < mended and printed == pytest.approx(mended * 98 / 99, abs=0.01)


def test_a_uniform_model_scores_at_chance():
    words = Chars(64)
    model = uniform_model(words.size, 128)
    test = eval_copy.make_test(words, "full", 128, samples=100)
    scores = eval_copy.copy_scores(model, test)
    assert scores["exact"] == 0 and scores["token"] < 3 / 64
    assert scores["logprob"] == pytest.approx(-np.log(65), abs=1e-4)
    heads = eval_copy.head_scores(model, words)
    assert np.ptp(heads["induction"]) < 1e-6 and np.max(heads["induction"]) < 0.02


@pytest.mark.parametrize("words", [Chars(20), Ids(24)], ids=["bos", "no bos"])
def test_shared_prefix_scores_equal_plain_forward_passes_and_greedy_decoding(words):
    model = small_model(words)
    test = eval_copy.make_test(words, "full", 96, samples=30)
    exact, token, first, logprob = [], [], [], []
    for context in torch.from_numpy(test.contexts):
        for i in test.asked:
            lead = [] if words.bos is None else [words.bos]
            prompt = torch.cat((torch.tensor(lead, dtype=torch.int64), context.flatten(), context[i, :12]))[None]
            suffix = context[i, 12:]
            greedy = torch.stack(list(model.generate(prompt, 6)), 1)[0]
            exact.append(torch.equal(greedy, suffix))
            logits = model(torch.cat((prompt, suffix[None, :-1]), 1))[0, -6:]
            hits = logits.argmax(-1) == suffix
            token.append(hits.float().mean().item())
            first.append(hits[0].item())
            logprob.append(logits.log_softmax(-1)[range(6), suffix].mean().item())
    scores = eval_copy.copy_scores(model, test)
    assert scores["exact"] == np.mean(exact) and scores["queries"] == len(exact)
    assert scores["token"] == pytest.approx(np.mean(token)) and scores["first"] == pytest.approx(np.mean(first))
    assert scores["logprob"] == pytest.approx(np.mean(logprob), abs=1e-4)
    assert scores["token"] > 0  # or the comparison above would say nothing


def test_the_layout_is_the_papers_where_it_fits_and_scaled_where_not():
    words = Bytes()
    full = eval_copy.make_test(words, "full", 1024, samples=2)
    assert full.contexts.shape == (2, 50, 18) and [i + 1 for i in full.asked] == list(range(5, 51, 5))
    for seq_len, n in ((918, 50), (917, 49), (128, 6), (54, 2)):
        test = eval_copy.make_test(words, "full", seq_len, samples=2)
        assert test.contexts.shape[1] == n and 1 + n * 18 + 17 <= seq_len
        assert len(test.asked) == (10 if n == 50 else n)
    with pytest.raises(ConfigError, match="seq_len=53: too short for the copy test, which takes 54"):
        eval_copy.make_test(words, "full", 53)


def test_samples_depend_on_their_arguments_alone_and_prefixes_and_suffixes_are_unique():
    words = Chars(64)
    test = eval_copy.make_test(words, "2", 128, samples=200)
    again = eval_copy.make_test(words, "2", 128, samples=200)
    assert np.array_equal(test.contexts, again.contexts)
    for sample in test.contexts:
        assert len(np.unique(sample[:, :12], axis=0)) == len(np.unique(sample[:, 12:], axis=0)) == 6
    raw = np.random.default_rng([0, 2]).choice(2, (200, 6, 18))  # of two ids, many samples must have been drawn anew
    assert any(len(np.unique(s[:, 12:], axis=0)) < 6 for s in raw)


def test_alphabets():
    words = Chars(64)
    assert "".join(words.alphabet[i] for i in eval_copy.alphabet_ids(words, "hex16")) == "0123456789abcdef"
    assert list(eval_copy.alphabet_ids(words, "full")) == list(range(64))
    some = eval_copy.alphabet_ids(words, "10")
    assert len(set(some)) == 10 and words.bos not in some
    assert len(eval_copy.alphabet_ids(Ids(500), "hex16")) == 16
    for name in ("65", "1", "hexx", "-3", ""):
        with pytest.raises(ConfigError, match=f"alphabet={name}: expected full"):
            eval_copy.alphabet_ids(words, name)


def test_kgram_ceilings_equal_a_matcher_written_out():
    words = Chars(6)
    test = eval_copy.make_test(words, "full", 128, samples=12)
    for k in eval_copy.K:
        expected = []
        for context in test.contexts:
            for i in test.asked:
                seen, chance = [*context.flatten(), *context[i, :12]], 1.0
                for target in context[i, 12:]:
                    followers = [seen[j + k] for j in range(len(seen) - k) if seen[j : j + k] == seen[-k:]]
                    chance *= followers.count(target) / len(followers)
                    seen.append(target)
                expected.append(chance)
        assert eval_copy.kgram_ceiling(test, k) == pytest.approx(np.mean(expected), abs=1e-9)


def test_kgram_ceilings_of_the_papers_layout():
    """300 queries by an independent matcher gave 0.50 and 0.97 for k = 3, 4 at hex16, and 0.94 for k = 1 at 32,000 ids:
    one standard error of 300 queries is 0.03, 0.01 and 0.014.
    """
    hex16 = eval_copy.make_test(Bytes(), "hex16", 1024, samples=60)
    assert eval_copy.kgram_ceiling(hex16, 1) < 0.01 and eval_copy.kgram_ceiling(hex16, 2) < 0.03
    assert eval_copy.kgram_ceiling(hex16, 3) == pytest.approx(0.50, abs=0.07)
    assert eval_copy.kgram_ceiling(hex16, 4) == pytest.approx(0.97, abs=0.03)
    full = eval_copy.make_test(Ids(32000), "full", 1024, samples=30)
    assert eval_copy.kgram_ceiling(full, 1) == pytest.approx(0.94, abs=0.04) and eval_copy.kgram_ceiling(full, 2) > 0.99


def test_the_command_prints_a_table_and_writes_json_and_a_picture(tmp_path, capsys):
    words = Chars(20)
    out = tmp_path / "a run"  # a path with a space
    out.mkdir()
    save(out / "ckpt.pt", small_model(words), words)
    rows = [{"step": s, "tokens": s, "val_loss": 3.0, "val_loss_new": 3.1, "copy_exact_full": 0.1 * s} for s in range(4)]
    (out / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    args = ["--samples=20", "--json", tmp_path / "s.json", "--plot", tmp_path / "p.png"]
    assert eval_copy.main([str(a) for a in (out, out / "ckpt.pt", *args, "--alphabet", "full", "4")]) == 0
    printed = capsys.readouterr().out
    assert "4 sequences of 12+6 tokens, 4 of them asked, 20 samples: 80 queries" in printed
    scores = json.loads((tmp_path / "s.json").read_text())
    assert len(scores) == 2 and scores[0]["step"] == 3 and set(scores[0]["copy"]) == {"full", "4"}
    assert f"{scores[0]['copy']['4']['token']:.3f}" in printed
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")


def test_the_prompt_is_gone_on_with(tmp_path):
    words = Chars(64)
    model, _, _ = induction_model(words.size, 256, words.bos)
    save(tmp_path / "ckpt.pt", model, words)
    text = "the quick brown fox jumps. the qui"
    command = [sys.executable, "eval_copy.py", str(tmp_path / "ckpt.pt"), "--prompt", text]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith(text + "ck brown fox jumps. the quick brown fox jumps.")


def test_each_mistake_ends_with_status_2_and_one_line(tmp_path, capsys):
    words = Chars(20)
    save(tmp_path / "ckpt.pt", small_model(words), words)
    save(tmp_path / "short.pt", small_model(words, seq_len=40), words)
    (tmp_path / "text.pt").write_text("no checkpoint")
    state = checkpoint.load(tmp_path / "ckpt.pt")
    checkpoint.save(tmp_path / "wide.pt", state | {"config": state["config"] | {"dim": 64}})
    checkpoint.save(tmp_path / "strange.pt", state | {"config": state["config"] | {"dims": 64}})
    cases = [
        (["none.pt"], "none.pt: no such checkpoint"),
        (["text.pt"], "text.pt: not a checkpoint"),
        (["short.pt"], "seq_len=40: too short"),
        (["wide.pt"], "do not fit"),
        (["strange.pt"], "dims: no such setting"),
        (["ckpt.pt", "--alphabet", "21"], "alphabet=21"),
        (["ckpt.pt", "--prompt", "A"], "character 'A'"),
        (["ckpt.pt", "--prompt", "a" * 96], "97 tokens"),
        (["ckpt.pt", "--samples=1", "--json", str(tmp_path / "no/x.json")], "no/x.json"),
    ]
    for (name, *args), words in cases:
        assert eval_copy.main([str(tmp_path / name), *args]) == 2
        error = capsys.readouterr().err
        assert words in error and len(error.strip().splitlines()) == 1

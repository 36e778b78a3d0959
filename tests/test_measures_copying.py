import numpy as np
import pytest
import torch

from data.tokenizer import Bytes, Chars, Ids
from errors import UserError
from eval_copy import make_tests, vocabulary
from measures import heads, kgrams
from measures.alphabets import alphabet, default_alphabets
from measures.copying import Predictions, copy_scores, make_test, predict
from measures.kgrams import K, kgram_baseline
from tests.handbuilt import induction_model, uniform_model
from tests.test_eval_copy import small_model


def make_copy_test(tokenizer, name, seq_len, samples=500):
    return make_tests(tokenizer, seq_len, samples, [name])[name]


def predicting(tokens):
    return Predictions(tokens, None, None, None)


def ceiling(test, k):
    return kgram_baseline(test, predicting(test.suffixes()))["ceiling"][k]


def test_the_hand_built_induction_model_scores_1_and_its_two_heads_are_found():
    tokenizer = Bytes()
    model, previous, induction = induction_model(tokenizer.size, 1024, tokenizer.bos)
    test = make_copy_test(tokenizer, "full", 1024, 20)
    scores = copy_scores(test, predict(model, test))
    assert scores["exact"] == scores["token"] == scores["first"] == 1.0 and scores["queries"] == 200
    assert scores["exact_by_sequence"] == {i: 1.0 for i in range(5, 51, 5)}
    found = heads.attention_scores(model, np.arange(256), tokenizer.bos)
    for name, head in (("induction", induction), ("previous", previous)):
        score = found[name]
        assert np.unravel_index(score.argmax(), score.shape) == head and score[head] > 0.95
        score[head] = 0
        assert score.max() < 0.5


def test_a_uniform_model_scores_at_chance():
    tokenizer = Chars(64)
    model = uniform_model(tokenizer.size, 128)
    test = make_copy_test(tokenizer, "full", 128, 100)
    scores = copy_scores(test, predict(model, test))
    assert scores["exact"] == 0 and scores["token"] < 3 / 64
    assert scores["logprob"] == pytest.approx(-np.log(65), abs=1e-4)
    found = heads.attention_scores(model, np.arange(64), tokenizer.bos)
    assert np.ptp(found["induction"]) < 1e-6 and np.max(found["induction"]) < 0.02


@torch.no_grad()
@pytest.mark.parametrize("tokenizer", [Chars(20), Ids(24)], ids=["bos", "no bos"])
def test_shared_prefix_scores_equal_plain_forward_passes_and_greedy_decoding(tokenizer):
    model = small_model(tokenizer)
    test = make_copy_test(tokenizer, "full", 96, 30)
    exact, token, first, logprob, token_unseen, logprob_unseen = [], [], [], [], [], []
    lead = [] if tokenizer.bos is None else [tokenizer.bos]
    for sequences, context in zip(torch.from_numpy(test.sequences), torch.from_numpy(test.context()), strict=True):
        context = torch.cat((torch.tensor(lead, dtype=torch.int64), context))
        for i in test.asked:
            prompt, suffix = torch.cat((context, sequences[i, :12]))[None], sequences[i, 12:]
            greedy = torch.stack(list(model.generate(prompt, 6)), 1)[0]
            exact.append(torch.equal(greedy, suffix))
            logits = model(torch.cat((prompt, suffix[None, :-1]), 1))[0, -6:]
            hits = logits.argmax(-1) == suffix
            token.append(hits.float().mean().item())
            first.append(hits[0].item())
            logprob.append(logits.log_softmax(-1)[range(6), suffix].mean().item())
            end = len(lead) + i * 18 + 17  # the same tokens at their first occurrence
            assert torch.equal(context[end - 5 : end + 1], suffix)
            logits = model(context[None, :end])[0, -6:]
            token_unseen.append((logits.argmax(-1) == suffix).float().mean().item())
            logprob_unseen.append(logits.log_softmax(-1)[range(6), suffix].mean().item())
    scores = copy_scores(test, predict(model, test))
    assert scores["exact"] == np.mean(exact) and scores["queries"] == len(exact)
    assert scores["token"] == pytest.approx(np.mean(token)) and scores["first"] == pytest.approx(np.mean(first))
    assert scores["logprob"] == pytest.approx(np.mean(logprob), abs=1e-4)
    assert scores["token_unseen"] == pytest.approx(np.mean(token_unseen))
    assert scores["logprob_unseen"] == pytest.approx(np.mean(logprob_unseen), abs=1e-4)
    assert scores["token"] > 0  # or the comparison above would say nothing


def test_the_layout_is_the_papers_where_it_fits_and_scaled_where_not():
    tokenizer = Bytes()
    full = make_copy_test(tokenizer, "full", 1024, 2)
    assert full.sequences.shape == (2, 50, 18) and [i + 1 for i in full.asked] == list(range(5, 51, 5))
    for seq_len, n in ((918, 50), (917, 49), (128, 6), (54, 2)):
        test = make_copy_test(tokenizer, "full", seq_len, 2)
        assert test.sequences.shape[1] == n and 1 + n * 18 + 17 <= seq_len
        assert len(test.asked) == (10 if n == 50 else n)
    with pytest.raises(UserError, match="a context of 53 tokens is too short for the copy test, which takes 54"):
        make_copy_test(tokenizer, "full", 53)


def test_samples_depend_on_their_arguments_alone_and_prefixes_and_suffixes_are_unique():
    tokenizer = Chars(64)
    for seq_len, n in ((128, 6), (1024, 50)):  # 50 of the 64 suffixes that two ids can form
        test = make_copy_test(tokenizer, "2", seq_len, 200)
        assert np.array_equal(test.sequences, make_copy_test(tokenizer, "2", seq_len, 200).sequences)
        for sample in test.sequences:
            assert len(np.unique(sample[:, :12], axis=0)) == len(np.unique(sample[:, 12:], axis=0)) == n
    raw = np.random.default_rng([0, 2]).choice(2, (200, 6, 18))  # of two ids, many sequences must have been drawn again
    assert any(len(np.unique(s[:, 12:], axis=0)) < 6 for s in raw)


def test_alphabets():
    tokenizer = Chars(64)
    ours = vocabulary(tokenizer)
    assert "".join(tokenizer.alphabet[i] for i in alphabet(ours, "hex16")) == "0123456789abcdef"
    assert list(alphabet(ours, "full")) == list(range(64))
    some = alphabet(ours, "10")
    assert len(set(some)) == 10 and tokenizer.bos not in some
    assert len(alphabet(vocabulary(Ids(500)), "hex16")) == 16
    for name in ("65", "1", "hexx", "-3", "", "top", "top65"):
        with pytest.raises(UserError, match=f"alphabet={name}: expected full"):
            alphabet(ours, name)
    for name in ("top16", "freq", "seen"):
        with pytest.raises(
            UserError, match=f"alphabet={name}: how often each id occurs .* is not known for this model; use full"
        ):
            alphabet(ours, name)
    assert default_alphabets(ours) == default_alphabets(vocabulary(Bytes())) == ["full", "hex16"]


def counted():
    """A tokenizer whose training data holds id i in proportion to i, bos most often, and half of the ids never."""
    tokenizer = Bytes()
    tokenizer.counts = np.where(np.arange(257) < 128, np.arange(257), 0) * 1000
    tokenizer.counts[256] = 10**6
    return tokenizer


def test_alphabets_of_the_training_data():
    tokenizer = counted()
    ours = vocabulary(tokenizer)
    assert list(alphabet(ours, "top4")) == [124, 125, 126, 127]  # bos is no test token
    assert list(alphabet(ours, "seen")) == list(range(1, 128))
    tests = make_tests(tokenizer, 128, 300, ["freq", "full"])
    used, times = np.unique(tests["freq"].sequences, return_counts=True)
    assert set(used) <= set(range(1, 128)) and times[-20:].mean() > 3 * times[:20].mean()
    assert ours.untrained(np.unique(tests["full"].sequences)) == (129, 129)
    assert ours.untrained([0, 1, 2]) == (1, 1) and vocabulary(Bytes()).untrained([1]) is None
    assert default_alphabets(ours) == ["full", "hex16", "top128"]
    assert list(make_tests(tokenizer, 128, 3)) == ["full", "hex16", "top128"]


def test_passages_are_text_of_random_places_and_hold_no_bos():
    text = np.arange(1000) % 97 + 1
    text[500] = 0
    test = make_test(text, 128, bos=0, samples=50, passages=True)
    assert (np.diff(test.sequences, axis=-1) % 97 == 1).all() and len(np.unique(test.sequences[:, :, 0])) > 50
    with pytest.raises(UserError, match="10 tokens to draw from: too few for 6 sequences"):
        make_test(text[:10], 128, bos=0, samples=5, passages=True)
    with pytest.raises(UserError, match="too few for 6 sequences with different prefixes and suffixes"):
        make_test(np.ones(40, dtype=np.int64), 128, bos=0, samples=5, passages=True)
    assert list(make_tests(Bytes(), 128, 5, text=text[:10])) == ["full", "hex16"]  # by default it is left out
    with pytest.raises(UserError, match="10 tokens to draw from"):
        make_tests(Bytes(), 128, 5, ["text"], text=text[:10])
    with pytest.raises(UserError, match="alphabet=text: .* pass --data=FOLDER"):
        make_tests(Bytes(), 128, 5, ["text"])


def test_kgram_ceilings_equal_a_matcher_written_out():
    test = make_copy_test(Chars(6), "full", 128, 12)
    for k in K:
        expected = []
        for context in test.sequences:
            for i in test.asked:
                seen, chance = [*context.flatten(), *context[i, :12]], 1.0
                for target in context[i, 12:]:
                    followers = [seen[j + k] for j in range(len(seen) - k) if seen[j : j + k] == seen[-k:]]
                    chance *= followers.count(target) / len(followers)
                    seen.append(target)
                expected.append(chance)
        assert ceiling(test, k) == pytest.approx(np.mean(expected), abs=1e-9)


def test_kgram_ceilings_of_the_papers_layout():
    """300 queries by an independent matcher gave 0.50 and 0.97 for k = 3, 4 at hex16, and 0.94 for k = 1 at 32,000 ids:
    one standard error of 300 queries is 0.03, 0.01 and 0.014.
    """
    hex16 = make_copy_test(Bytes(), "hex16", 1024, 60)
    assert ceiling(hex16, 1) < 0.01 and ceiling(hex16, 2) < 0.03
    assert ceiling(hex16, 3) == pytest.approx(0.50, abs=0.07)
    assert ceiling(hex16, 4) == pytest.approx(0.97, abs=0.03)
    full = make_copy_test(Ids(32000), "full", 1024, 30)
    assert ceiling(full, 1) == pytest.approx(0.94, abs=0.04) and ceiling(full, 2) > 0.99


def test_the_hash_is_that_of_the_questions():
    ids = np.arange(64)
    tests = [make_test(ids, n, 64, samples=s, seed=d) for n, s, d in ((128, 9, 0), (256, 9, 0), (128, 8, 0), (128, 9, 1))]
    assert len({test.hash() for test in tests}) == 4
    assert tests[0].hash() == make_copy_test(Chars(64), "full", 128, 9).hash() == "77e19cef6098"


def baseline_predictions(test, k, seed=0):
    """The predictions of the k-gram baseline."""
    rng = np.random.default_rng(seed)
    ids = kgrams.numbered(test)[1]
    drawn = [[rng.choice(len(p), p=p / p.sum()) for p in counts[k]] for counts in kgrams.follower_counts(test)]
    drawn = np.array(drawn).reshape(len(test.asked), 6, -1).swapaxes(1, 2)  # (asked, samples, 6)
    return predicting(np.stack([known[drawn[:, s]] for s, known in enumerate(ids)], axis=1))


@pytest.mark.parametrize("k", [0, *K])
def test_the_baseline_of_k_tokens_is_found_to_use_k_tokens(k):
    # Nearly every token follows every other one somewhere, so that the baselines of 0 and 1 differ in few places.
    test = make_copy_test(Bytes(), "hex16", 1024, 200 if k == 0 else 40)
    predictions = baseline_predictions(test, k)
    found = kgram_baseline(test, predictions)
    for j, use in found["uses"].items():
        assert use == pytest.approx(float(j <= k), abs=0.2), found
    exact = (predictions.tokens == test.suffixes()).all(-1).mean() if k else 0
    assert exact == pytest.approx(found["ceiling"].get(k, 0), abs=0.08)


def test_a_model_that_predicts_what_its_context_lacks_uses_nothing():
    test = make_copy_test(Ids(5000), "full", 1024, 5)
    absent = np.setdiff1d(np.arange(5000), test.sequences)[0]
    found = kgram_baseline(test, predicting(np.full_like(test.suffixes(), absent)))
    assert not any(found["uses"].values())

"""Losses and recall, against loops that ask one question at a time and models for which they are known."""

import numpy as np
import pytest
import torch

from errors import UserError
from measures import batching, context, heads
from tests.handbuilt import induction_model, uniform_model
from tests.test_measures_heads import LETTERS, small_model


def loss_of(model, before, token):
    """-log p(token | before), one pass for one token."""
    logits = model(torch.tensor([[int(t) for t in before]]))[0, -1].double()
    return -logits.log_softmax(-1)[int(token)].item()


@torch.no_grad()
def test_position_losses_equal_one_question_at_a_time(monkeypatch):
    model, windows = small_model(), np.random.default_rng(0).choice(40, (3, 13))
    expected = [np.mean([loss_of(model, w[: t + 1], w[t + 1]) for w in windows]) for t in range(12)]
    losses = context.position_scores(model, windows)["loss"]
    assert len(losses) == 12
    np.testing.assert_allclose(losses, expected, rtol=0, atol=1e-5)
    monkeypatch.setattr(batching, "TOKENS", 13)  # one window a pass, 5 rows of the head at once
    monkeypatch.setattr(batching, "ROWS", 5)
    np.testing.assert_allclose(context.position_scores(model, windows)["loss"], losses, rtol=0, atol=1e-6)


def test_losses_take_the_uint16_of_a_bin():
    windows = np.random.default_rng(0).choice(40, (3, 13))
    model = small_model()
    assert np.array_equal(context.token_losses(model, windows.astype(np.uint16)), context.token_losses(model, windows))


@torch.no_grad()
@pytest.mark.parametrize("bos", [39, None])
def test_induction_loss_equals_one_question_at_a_time(bos):
    model = small_model(seq_len=21)  # so s is 10, and one place is left over
    tokens = heads.repeated(LETTERS, 10, 4, 0, None)
    if bos is not None:
        tokens[:, 0] = bos
    losses = {
        name: np.mean([loss_of(model, row[:p], row[p]) for row in tokens for p in predicted])
        for name, predicted in (("first", range(2, 10)), ("second", range(12, 20)))
    }
    assert context.induction_loss(model, LETTERS, bos, samples=4) == pytest.approx(losses, abs=1e-5)


def test_induction_loss_of_a_model_that_knows_nothing_is_log_v_in_both_copies():
    losses = context.induction_loss(uniform_model(50, 100), np.arange(49), 49, samples=2)
    assert losses == pytest.approx({"first": np.log(50), "second": np.log(50)}, abs=1e-6)


def test_induction_loss_of_the_hand_built_model_is_log_v_in_the_first_copy_and_near_0_in_the_second():
    model, _, _ = induction_model(257, 512, bos=256)
    losses = context.induction_loss(model, np.arange(256), 256, samples=4)
    assert losses["first"] == pytest.approx(np.log(257), abs=0.05) and losses["second"] < 0.2


def test_icl_score_is_the_later_loss_less_the_earlier_counted_from_1(monkeypatch):
    losses = np.arange(1, 1001) ** -0.5
    for T, late in ((1000, (500, 1000)), (999, (500,)), (500, (500,)), (499, ())):
        both = np.stack((losses, 3 * losses))  # of two windows
        monkeypatch.setattr(context, "token_losses", lambda model, windows, both=both: both[:, : windows.shape[1] - 1])
        scores = context.position_scores(small_model(), np.zeros((2, T + 1)))
        for n in (500, 1000):
            gain = n**-0.5 - 50**-0.5  # and three times as much: a mean of 2 and, of two values, a standard error of 1
            assert scores[f"icl_50_{n}"] == (pytest.approx([2 * gain, abs(gain)], abs=1e-12) if n in late else None)
    monkeypatch.setattr(context, "token_losses", lambda *_: losses[None])
    assert context.position_scores(small_model(), np.zeros((1, 1001)))["icl_50_500"][1] is None


@torch.no_grad()
@pytest.mark.parametrize("bos, seq_len", [(39, 64), (None, 64), (39, 128), (None, 21)])
def test_associative_recall_equals_one_question_at_a_time(bos, seq_len, monkeypatch):
    """s is 31, 32, 39 (all the ids there are) and 10."""
    model, lead = small_model(seq_len=seq_len), [] if bos is None else [bos]
    s = min(50, (seq_len - len(lead)) // 2, 39)
    rng, hits, ranks = np.random.default_rng(0), [], []
    for _ in range(5):
        part = list(rng.permutation(LETTERS)[:s])
        assert len(set(part)) == s
        for j in range(s):
            logits = model(torch.tensor([lead + part + part[: j + 1]]))[0, -1]
            right = part[(j + 1) % s]
            hits.append(logits.argmax().item() == right)
            ranks.append((logits > logits[right]).sum().item())
    found = context.associative_recall(model, LETTERS, bos, samples=5)
    assert found == pytest.approx({"accuracy": np.mean(hits), "rank": np.mean(ranks)}, abs=1e-6)
    monkeypatch.setattr(batching, "TOKENS", 2 * s)  # one sample a pass, 7 rows of the head at once
    monkeypatch.setattr(batching, "ROWS", 7)
    assert context.associative_recall(model, LETTERS, bos, samples=5) == pytest.approx(found, abs=1e-6)


def test_recall_of_a_model_that_knows_nothing_is_that_of_a_guess():
    found = context.associative_recall(uniform_model(65, 128), np.arange(64), 64, samples=3)
    assert found == pytest.approx({"accuracy": 1 / 65, "rank": 32}, abs=1e-6)


def test_recall_of_the_hand_built_model_is_perfect_from_the_third_token_of_the_second_copy_on():
    """It wants 3 tokens that agree: of the first two of 50, what it attends to least of all may still tip the balance."""
    model, _, _ = induction_model(257, 128, bos=256)
    found = context.associative_recall(model, np.arange(256), 256, samples=4)
    assert 48 / 50 <= found["accuracy"] <= 1 and found["rank"] <= 2 * 256 / 50


def test_the_same_arguments_give_the_same_measures_and_another_seed_others():
    model = small_model()
    for measure in (context.induction_loss, context.associative_recall):
        one, two, other = (measure(model, LETTERS, 39, samples=4, seed=seed) for seed in (0, 0, 1))
        assert one == two != other


def test_a_context_too_short_is_named():
    with pytest.raises(UserError, match="seq_len=5: too short for the induction loss, which takes 6"):
        context.induction_loss(small_model(seq_len=5), LETTERS, 39)
    with pytest.raises(UserError, match="seq_len=4: too short"):
        context.associative_recall(small_model(seq_len=4), LETTERS, 39)


def test_nothing_is_float64_on_the_device(monkeypatch):
    """Apple's GPUs have no float64: Tensor.double raises there."""
    model = small_model()

    def double(tensor):
        raise TypeError("Cannot convert a MPS Tensor to float64")

    expected = context.key_values(model, LETTERS, 39)
    monkeypatch.setattr(torch.Tensor, "double", double)
    assert context.key_values(model, LETTERS, 39) == expected
    assert 0 <= context.associative_recall(model, LETTERS, 39)["accuracy"] <= 1

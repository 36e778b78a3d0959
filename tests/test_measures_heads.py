"""The scores of heads, against closed forms, a model whose weights are set by hand, and products written out."""

import dataclasses
import weakref

import numpy as np
import pytest
import torch

from config import ModelConfig
from data.tokenizer import Bytes
from errors import UserError
from kernels import eager
from measures import batching, heads
from measures.table import WIDTH
from model import Llama
from tests.handbuilt import induction_model, uniform_model

SMALL = ModelConfig(dim=32, n_layers=3, n_heads=4, n_kv_heads=2, hidden_dim=32, vocab_size=40, seq_len=64)
LETTERS = np.arange(39)


def small_model(seed=0, dtype=torch.float32, **changes):
    """Far from its initialisation: attention that is not flat, gains that are not 1."""
    torch.manual_seed(seed)
    model = Llama(dataclasses.replace(SMALL, **changes), eager, dtype).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(8) if p.dim() == 2 else p.normal_(1, 0.4)
    return model


def expanded(model):
    """The model with as many key and value heads as query heads: head h has those of h // (H / Hkv)."""
    c = model.config
    other = Llama(dataclasses.replace(c, n_kv_heads=c.n_heads), eager).eval()
    state = dict(model.state_dict())
    for name in [name for name in state if name.endswith("wqkv.weight")]:
        q, k, v = state[name].split([n * c.head_dim for n in (c.n_heads, c.n_kv_heads, c.n_kv_heads)])
        groups = [h // (c.n_heads // c.n_kv_heads) for h in range(c.n_heads)]
        k, v = (torch.cat([w[g * c.head_dim : (g + 1) * c.head_dim] for g in groups]) for w in (k, v))
        state[name] = torch.cat((q, k, v))
    other.load_state_dict(state)
    return other


def perfect_pattern(s, lead):
    """(1, 1, T, T): each token of the second copy attends to what followed it in the first, the others to themselves."""
    T = lead + 2 * s
    probs = torch.zeros(1, 1, T, T)
    for q in range(T):
        probs[..., q, q - s + 1 if q >= lead + s else q] = 1
    return probs


def written_out(probs, s, lead):
    """The definitions one index at a time, positions of the repeated tokens from 1."""

    def mean(pairs):
        return np.mean([probs[:, :, lead + q - 1, lead + k - 1].mean(0) for q, k in pairs], axis=0)

    return {
        "induction": mean([(s + i - 1, i) for i in range(2, s + 1)]),
        "induction_paper": mean([(s + i - 1, i) for i in range(1, s)]),
        "diagonal": mean([(s + i - 1, i) for i in range(1, s + 2)]),
        "duplicate": mean([(s + i, i) for i in range(1, s + 1)]),
        "previous": mean([(q, q - 1) for q in range(2 - lead, 2 * s + 1)]),
    }


def test_repeated_tokens_are_of_the_alphabet_in_one_order_and_depend_on_their_arguments_alone():
    ids = np.array([3, 5, 8, 9])
    for bos, times in ((7, 2), (None, 4), (0, 3)):
        tokens = heads.repeated(ids, 20, 6, 1, bos, times)
        lead = 0 if bos is None else 1
        assert tokens.shape == (6, lead + times * 20) and tokens.dtype == np.int64
        assert (tokens[:, :lead] == bos).all() and set(tokens[:, lead:].flatten()) == set(ids)
        copies = np.split(tokens[:, lead:], times, axis=1)
        assert all(np.array_equal(copy, copies[0]) for copy in copies)
        assert np.array_equal(tokens, heads.repeated(ids, 20, 6, 1, bos, times))
        assert not np.array_equal(tokens, heads.repeated(ids, 20, 6, 2, bos, times))
        # The draw is one for all bos and times, and which one it is does not change: scores of two versions can be compared.
        assert np.array_equal(copies[0], np.random.default_rng(1).choice(ids, (6, 20)))


@pytest.mark.parametrize("lead", [0, 1])
def test_a_perfect_head_scores_1_and_the_printed_range_and_the_whole_diagonal_less(lead):
    scores = {name: value.item() for name, value in heads.pattern_scores(perfect_pattern(100, lead), 100, lead).items()}
    assert scores["induction"] == 1 and scores["duplicate"] == 0
    assert scores["induction_paper"] == pytest.approx(98 / 99, abs=1e-7) and round(scores["induction_paper"], 4) == 0.9899
    assert scores["diagonal"] == pytest.approx(100 / 101, abs=1e-7)


@pytest.mark.parametrize("bos", [39, None])
def test_pattern_scores_equal_the_definitions_written_out(bos):
    model, lead = small_model(), int(bos is not None)
    scores = heads.attention_scores(model, LETTERS, bos, samples=4)
    s = (64 - lead) // 2
    tokens = torch.from_numpy(heads.repeated(LETTERS, s, 4, 0, bos))
    for layer, probs in enumerate(model.attention_maps(tokens)):
        for name, expected in written_out(probs.double().numpy(), s, lead).items():
            assert scores[name].shape == (3, 4) and scores[name].dtype == np.float64
            np.testing.assert_allclose(scores[name][layer], expected, rtol=0, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("bos", [64, None])
def test_uniform_attention_scores_the_mean_of_one_over_the_tokens_in_view(bos):
    lead, model = int(bos is not None), uniform_model(65, 240)
    scores = heads.attention_scores(model, np.arange(64), bos, samples=2) | {
        "prefix_matching": heads.prefix_matching(model, np.arange(64), bos)
    }
    seen = 1 / (np.arange(lead + 200) + 1)[lead:]  # of a key, by query among the repeated tokens
    expected = {
        "induction": seen[100:199].mean(),
        "induction_paper": seen[99:198].mean(),
        "diagonal": seen[99:200].mean(),
        "duplicate": seen[100:200].mean(),
        "previous": (1 / np.arange(2, lead + 201)).mean(),
        "prefix_matching": sum(m * seen[25 * m : 25 * (m + 1)].sum() for m in (1, 2, 3)) / 75,
    }
    for name, value in expected.items():
        np.testing.assert_allclose(scores[name], value, rtol=0, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("bos", [39, None])
def test_prefix_matching_equals_its_definition_written_out_and_shrinks_with_the_context(bos):
    model, lead = small_model(), int(bos is not None)
    s = (64 - lead) // 4
    tokens = heads.repeated(LETTERS, s, 10, 0, bos, times=4)
    maps = [probs.double().numpy() for probs in model.attention_maps(torch.from_numpy(tokens))]
    expected = np.zeros((3, 4))
    for layer, probs in enumerate(maps):
        for q in range(s, 4 * s):
            earlier = range(q % s, q, s)  # the places of this token, in copies before this one
            expected[layer] += sum(probs[:, :, lead + q, lead + j + 1].mean(0) for j in earlier) / (3 * s)
    np.testing.assert_allclose(heads.prefix_matching(model, LETTERS, bos), expected, rtol=0, atol=1e-6)


def test_the_hand_built_induction_head_is_found_and_no_other():
    tokenizer = Bytes()
    model, previous, induction = induction_model(tokenizer.size, 512, tokenizer.bos)
    scores = heads.scores(model, np.arange(256), tokenizer.bos)
    for name in ("induction", "prefix_matching", "score_paper", "score_mended"):
        rest = scores[name].copy()
        rest[induction] = 0
        assert scores[name][induction] > 0.95 and np.abs(rest).max() < 0.05, name
    assert scores["previous"][previous] > 0.95
    assert scores["induction_paper"][induction] == pytest.approx(scores["induction"][induction] * 98 / 99, abs=0.01)
    assert scores["eigenvalue"][induction] == pytest.approx(1, abs=1e-9)  # it copies: a Gram matrix, whose eigenvalues are > 0
    assert scores["eigenvalue"][previous] == 0  # what it writes, no logit reads


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("folded", [False, True])
def test_eigenvalue_score_equals_that_of_the_whole_product(folded, tied):
    model = small_model(tie_embeddings=tied).double()
    weights = {name: p.detach().numpy() for name, p in model.named_parameters()} | {
        "lm_head.weight": model.lm_head.weight.detach()
    }
    W_E, W_U = weights["embed.weight"].T, np.asarray(weights["lm_head.weight"])
    if folded:
        W_U = W_U * weights["norm"]
    scores, values = heads.eigenvalue_score(model, folded), heads.ov_eigenvalues(model, folded)
    assert values.shape == (3, 4, 8) and values.dtype == np.complex128
    for layer in range(3):
        v = weights[f"blocks.{layer}.attention.wqkv.weight"][48:]  # 4 * 8 rows of q, 2 * 8 of k
        if folded:
            v = v * weights[f"blocks.{layer}.attention_norm"]
        for head in range(4):
            W_V = v[head // 2 * 8 : head // 2 * 8 + 8]
            W_O = weights[f"blocks.{layer}.attention.wo.weight"][:, head * 8 : head * 8 + 8]
            whole = np.linalg.eigvals(W_U @ W_O @ W_V @ W_E)  # (V,), of which V - Dh are 0
            assert scores[layer, head] == pytest.approx(whole.sum().real / np.abs(whole).sum(), abs=1e-10)
            largest = sorted(np.abs(whole))[-8:]
            np.testing.assert_allclose(sorted(np.abs(values[layer, head])), largest, rtol=1e-9)


def test_folding_changes_the_eigenvalue_score_where_gains_are_not_1_and_only_there():
    model = small_model()
    assert np.abs(heads.eigenvalue_score(model, folded=True) - heads.eigenvalue_score(model)).max() > 0.01
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 1:
                p.fill_(1)
    assert np.array_equal(heads.eigenvalue_score(model, folded=True), heads.eigenvalue_score(model))


def test_grouped_heads_score_as_the_same_model_with_its_keys_and_values_written_out():
    model = small_model()
    one, other = (heads.scores(m, LETTERS, 39, samples=4) for m in (model, expanded(model)))
    for name in one:
        np.testing.assert_allclose(one[name], other[name], rtol=0, atol=1e-6, err_msg=name)


def test_the_papers_score_is_the_product_of_its_factors_in_either_reading():
    scores = heads.scores(small_model(), LETTERS, 39, samples=4)
    assert np.array_equal(scores["score_paper"], scores["induction_paper"] * scores["eigenvalue"])
    assert np.array_equal(scores["score_mended"], scores["induction"] * scores["eigenvalue_folded"])
    assert np.abs(scores["score_mended"]).max() <= 1 and not np.allclose(scores["score_mended"], scores["score_paper"])


def test_the_same_arguments_give_the_same_scores_and_the_model_is_as_before():
    model = small_model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    one, two = (heads.scores(model, LETTERS, 39, samples=3) for _ in range(2))
    assert all(np.array_equal(one[name], two[name]) for name in one)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    another = heads.scores(model, LETTERS, 39, samples=3, seed=1)
    assert not any(np.array_equal(one[name], another[name]) for name in ("induction", "prefix_matching"))


def test_one_layer_s_attention_of_one_batch_is_in_memory_at_once(monkeypatch):
    model = small_model()
    whole = heads.scores(model, LETTERS, 39, samples=7)
    alive, most, original = set(), 0, model.attention_maps

    def attention_maps(tokens):
        nonlocal most
        for probs in original(tokens):
            alive.add(id(probs))
            weakref.finalize(probs, alive.discard, id(probs))
            assert len(probs) * probs.shape[-1] <= 130
            most = max(most, len(alive))
            yield probs

    monkeypatch.setattr(model, "attention_maps", attention_maps)
    monkeypatch.setattr(batching, "TOKENS", 130)  # two samples of 63 tokens; seven are not a multiple
    parts = heads.scores(model, LETTERS, 39, samples=7)
    for name in whole:
        np.testing.assert_allclose(parts[name], whole[name], rtol=0, atol=1e-6, err_msg=name)
    assert most <= 2  # that of a layer is freed once the next one's is there


def test_a_context_too_short_for_two_tokens_is_named():
    with pytest.raises(UserError, match="seq_len=4: too short for tokens that occur 2 times, which take 5 at least"):
        heads.attention_scores(small_model(seq_len=4), LETTERS, 39)
    with pytest.raises(UserError, match="seq_len=7: .* 4 times, which take 8"):
        heads.prefix_matching(small_model(seq_len=7), LETTERS, None)
    assert heads.attention_scores(small_model(seq_len=4), LETTERS, None)["induction"].shape == (3, 4)


def test_titles_leave_a_gap_before_the_first_value_of_the_table():
    assert all(len(score.title) <= WIDTH - 4 for score in heads.SCORES.values())

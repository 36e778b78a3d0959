"""Removed heads, against the same model with other weights, and against passes written out."""

import numpy as np
import pytest
import torch

from measures import ablation, context, heads
from measures.copying import make_test
from model import KVCache, Llama
from runtime.validation import repeated
from tests.handbuilt import induction_model
from tests.test_measures_heads import LETTERS, small_model

SOME = [(0, 1), (2, 0), (2, 3)]


def means_of(how, model, tokens):
    return ablation.head_means(model, tokens) if how == "mean" else None


def tokens(B=3, T=20, seed=0, V=40):
    return torch.randint(V, (B, T), generator=torch.Generator().manual_seed(seed))


def without_columns(model, removed):
    """The model with 0 in what attention.wo makes of these heads."""
    other = Llama(model.config, model.ops).eval()
    other.load_state_dict(model.state_dict())
    with torch.no_grad():
        for layer, head in removed:
            Dh = model.config.head_dim
            other.blocks[layer].attention.wo.weight[:, head * Dh : (head + 1) * Dh] = 0
    return other


@torch.no_grad()
def streams(model, x_tokens, replaced):
    """(logits, output of each head (L, B, T, H, Dh)), step by step. replaced(layer, out (B, T, H, Dh)) -> out."""
    rope, outputs = model.rope(0, x_tokens.shape[1]), []
    _, y, _ = model.embedded(x_tokens)
    for i, block in enumerate(model.blocks):
        q, k, v = block.attention.qkv(model.ops.rms_norm(y, block.attention_norm, block.eps), rope)
        probs = model.ops.attention_probs(q, k)  # (B, H, T, T)
        group = model.config.n_heads // model.config.n_kv_heads
        out = torch.einsum("bhqk,bkhd->bqhd", probs, v.repeat_interleave(group, dim=2))
        outputs.append(out)
        y = y + block.attention.wo(replaced(i, out.clone()).flatten(2))
        y = y + block.mlp(model.ops.rms_norm(y, block.mlp_norm, block.eps))
    return model.lm_head(model.ops.rms_norm(y, model.norm, model.config.norm_eps)), torch.stack(outputs)


@torch.no_grad()
def test_zero_equals_the_model_with_zero_in_the_columns_of_wo_exactly():
    model = small_model()
    other = without_columns(model, SOME)
    with ablation.removed(model, SOME) as same:
        assert same is model
        assert torch.equal(model(tokens()), other(tokens())) and not torch.equal(model(tokens()), small_model()(tokens()))
        for mine, theirs in zip(model.attention_maps(tokens()), other.attention_maps(tokens()), strict=True):
            assert torch.equal(mine, theirs)


@torch.no_grad()
def test_head_means_are_those_of_all_positions_and_samples():
    model = small_model()
    _, outputs = streams(model, tokens(), lambda layer, out: out)
    means = ablation.head_means(model, tokens().numpy())
    assert means.shape == (3, 4, 8)
    torch.testing.assert_close(means, outputs.mean((1, 2)), rtol=0, atol=1e-6)


@torch.no_grad()
def test_mean_equals_a_pass_with_the_means_in_the_place_of_the_outputs():
    model = small_model()
    means = ablation.head_means(model, tokens(seed=1))

    def replaced(layer, out):
        for i, head in SOME:
            if i == layer:
                out[..., head, :] = means[i, head]
        return out

    expected, _ = streams(model, tokens(), replaced)
    with ablation.removed(model, SOME, means):
        torch.testing.assert_close(model(tokens()), expected, rtol=0, atol=2e-5)


@torch.no_grad()
@pytest.mark.parametrize("how", ablation.HOW)
def test_a_pass_in_pieces_with_a_rewound_cache_equals_one_pass(how):
    model = small_model()
    with ablation.removed(model, SOME, means_of(how, model, tokens(seed=1))):
        cache = KVCache(model, 3)
        model.hidden(tokens()[:, :12], cache=cache)
        for seed in (0, 1, 2):  # three continuations of one beginning
            cache.length = 12
            more = tokens(seed=seed)[:, 12:]
            pieces = torch.cat([model(more[:, :5], cache=cache), model(more[:, 5:], cache=cache)], dim=1)
            whole = model(torch.cat((tokens()[:, :12], more), dim=1))[:, 12:]
            torch.testing.assert_close(pieces, whole, rtol=0, atol=2e-5)
        other = KVCache(model, 3)  # a second cache has its own values
        model.hidden(tokens(seed=5)[:, :12], cache=other)
        cache.length = 12
        torch.testing.assert_close(model(more, cache=cache), whole, rtol=0, atol=2e-5)


@torch.no_grad()
@pytest.mark.parametrize("how", ablation.HOW)
def test_the_model_is_as_before_afterwards_also_after_an_error(how):
    model = small_model()
    before, out = {name: value.clone() for name, value in model.state_dict().items()}, model(tokens())
    attributes = set(vars(model))
    for error in (None, ZeroDivisionError):
        try:
            with ablation.removed(model, SOME, means_of(how, model, tokens())):
                assert not torch.equal(model(tokens()), out)
                if error:
                    raise error
        except ZeroDivisionError:
            pass
        assert torch.equal(model(tokens()), out) and set(vars(model)) == attributes
        assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
        assert not any(module._forward_pre_hooks for module in model.modules())


@torch.no_grad()
@pytest.mark.parametrize("how", ablation.HOW)
def test_no_heads_removed_is_the_model_itself(how):
    model = small_model()
    with ablation.removed(model, [], means_of(how, model, tokens())):
        torch.testing.assert_close(model(tokens()), small_model()(tokens()), rtol=0, atol=1e-6)


@torch.no_grad()
def test_blocks_that_were_compiled_for_training_lose_their_heads_too():
    model = small_model()
    expected = without_columns(model, SOME)(tokens())
    for block in model.blocks:
        block.compile(backend="eager")
    with ablation.removed(model, SOME):
        assert torch.equal(model(tokens()), expected)


def test_random_heads_match_the_layers_and_are_none_of_the_top():
    top = [(0, 1), (2, 0), (2, 3)]
    draws = {tuple(ablation.matched(top, (3, 4), seed)) for seed in range(50)}
    for drawn in draws:
        assert [layer for layer, _ in drawn] == [0, 2, 2] and not set(drawn) & set(top) and len(set(drawn)) == 3
    assert len(draws) == 3  # 3 of layer 0, and the one pair that layer 2 has left
    for seed in range(20):  # layer 0 has one other head for three: two are of other layers
        drawn = ablation.matched([(0, 0), (0, 1), (0, 2)], (3, 4), seed)
        assert (0, 3) in drawn and len(set(drawn)) == 3 and not {(0, 0), (0, 1), (0, 2)} & set(drawn)
    six = [(layer, head) for layer in range(2) for head in range(3)]
    assert len(ablation.matched(six, (3, 4), 0)) == 6
    assert ablation.matched([*six, (2, 0)], (3, 4), 0) is None


@torch.no_grad()
def test_the_curve_holds_the_scores_of_the_models_with_those_heads_removed():
    model, ranking = small_model(), np.random.default_rng(0).random((3, 4))

    def score(model):
        return model(tokens()).square().mean().item()

    curve = ablation.ablation_curve(model, score, ranking, [0, 1, 3, 7], controls=2, seed=5)
    order = sorted(np.ndindex(3, 4), key=lambda head: -ranking[head])
    assert curve["k"] == [0, 1, 3, 7] and curve["heads"] == [list(head) for head in order[:7]]
    assert curve["top"] == [score(without_columns(model, order[:k])) for k in curve["k"]]
    sets = [[ablation.matched(order[:k], (3, 4), (5, k, c)) for c in range(2)] for k in (1, 3)]
    assert all(first != second for first, second in sets)
    assert curve["random"] == [[], *([score(without_columns(model, heads)) for heads in pair] for pair in sets), []]
    assert curve == ablation.ablation_curve(model, score, ranking, [0, 1, 3, 7], controls=2, seed=5)


@torch.no_grad()
def copied(model):
    """Share of right tokens where 40 random ones come again, the first 8 given, and the model goes on with its own."""
    part = torch.from_numpy(np.random.default_rng(0).choice(LETTERS, (8, 40)))
    prompt = torch.cat((torch.full((8, 1), 39), part, part[:, :8]), dim=1)
    new = torch.stack(list(model.generate(prompt, 12)), dim=1)  # (8, 12), through a KVCache
    return (new == part[:, 8:20]).float().mean().item()


@pytest.mark.parametrize("how", ablation.HOW)
def test_copying_is_lost_with_the_induction_head_and_kept_without_random_ones_of_its_layer(how):
    model, _, induction = induction_model(40, 128, bos=39)
    ranking = heads.attention_scores(model, LETTERS, 39, samples=4)["induction"]
    means = means_of(how, model, heads.repeated(LETTERS, 60, 8, 0, 39))
    curve = ablation.ablation_curve(model, copied, ranking, [0, 1], means)
    assert curve["heads"] == [list(induction)]
    assert curve["top"][0] == 1 and curve["top"][1] < 0.2
    assert curve["random"][0] == [] and set(curve["random"][1]) == {1}


def test_each_set_of_other_heads_is_scored_once():
    """With two heads a layer, the highest one has one other in its layer."""
    model = small_model(n_layers=3, n_heads=2)
    curve = ablation.ablation_curve(model, lambda _: 0.0, np.arange(6).reshape(3, 2), [0, 1, 2])
    assert [len(scores) for scores in curve["random"]][:2] == [0, 1] and len(curve["random"][2]) <= 3


def test_a_text_without_repeated_tokens_has_no_loss_on_them():
    model, _, _ = induction_model(40, 128, bos=39)
    windows = np.stack([np.random.default_rng(i).permutation(LETTERS)[:31] for i in range(2)])
    test = make_test(LETTERS, 128, 39, samples=2)
    ranking = np.ones((model.config.n_layers, model.config.n_heads))
    found = ablation.scores_without_heads(model, test, ranking, "zero", LETTERS, (windows, repeated(windows)))
    assert all(score.keys() == {"exact", "loss_new"} for score in found["top"])


def test_without_the_previous_token_head_copying_is_lost():
    """What the previous-token head writes is read by the induction head's keys."""
    model, _, _ = induction_model(40, 128, bos=39)

    def recall(model):
        return context.associative_recall(model, LETTERS, 39, samples=8)["accuracy"]

    whole = recall(model)
    with ablation.removed(model, [(0, head) for head in range(4)]):
        assert recall(model) < 0.1 < 0.9 < whole

"""The model against Hugging Face's, against an independent reference, and against the laws that a Llama obeys.

Logits are compared, not losses: weights in the wrong rotary layout move a loss by 1e-4 and logits by 2e-2.
"""

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch.utils._pytree import tree_leaves

from config import ModelConfig
from kernels import eager
from model import KVCache, Llama, rotary_table
from tests.handbuilt import induction_model, uniform_model
from tests.reference_llama import reference_logits, speeds

ROOT = Path(__file__).resolve().parent.parent
TINY = ModelConfig(dim=64, n_layers=3, n_heads=4, hidden_dim=96, vocab_size=50, seq_len=48)
KINDS = {
    "mha": TINY,
    "gqa": dataclasses.replace(TINY, n_kv_heads=2),
    "mqa_tied": dataclasses.replace(TINY, n_kv_heads=1, tie_embeddings=True, rope_theta=5e5),
    # Of the 12 frequencies of 24 channels, 3 are kept, 3 interpolated and 6 divided.
    "llama3": dataclasses.replace(TINY, head_dim=24, rope_theta=100.0, rope_factor=8.0, rope_original_seq_len=60),
    "linear_biased": dataclasses.replace(TINY, n_kv_heads=2, rope_factor=2.5, attention_bias=True, mlp_bias=True),
}
each_kind = pytest.mark.parametrize("config", KINDS.values(), ids=KINDS.keys())


def llama(config=TINY, dtype=torch.float32, **changes):
    """A small model far from its initialisation: logits of size 2, attention that is not flat, gains that are not 1."""
    torch.manual_seed(0)
    model = Llama(dataclasses.replace(config, **changes), eager, dtype)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.mul_(4) if p.dim() == 2 else p.normal_(0 if name.endswith("bias") else 1, 0.3)
    return model.eval()


def some_tokens(B=2, T=40, V=TINY.vocab_size, seed=0):
    return torch.randint(V, (B, T), generator=torch.Generator().manual_seed(seed))


# The shape, the weights


def test_llama162m_has_162417408_parameters():
    with torch.device("meta"):
        model = Llama(ModelConfig(), eager)
    assert sum(p.numel() for p in model.parameters()) == 162_417_408


@each_kind
def test_every_matrix_is_initialised_with_its_std(config):
    config = dataclasses.replace(config, dim=128, hidden_dim=160, vocab_size=400)
    torch.manual_seed(0)
    for name, p in Llama(config, eager).named_parameters():
        if p.dim() == 1:
            assert (p == (0 if name.endswith("bias") else 1)).all(), name
            continue
        std = 0.02 / 6**0.5 if name.split(".")[-2] in ("wo", "down") else 0.02  # 3 layers, each writes twice
        assert p.std().item() == pytest.approx(std, rel=5 / (2 * p.numel()) ** 0.5), name  # 5 standard errors
        assert abs(p.mean().item()) < 5 * std / p.numel() ** 0.5, name


def test_the_scaled_matrices_are_those_that_write_to_the_residual_stream():
    model = Llama(TINY, eager)
    scaled = {name for name, p in model.named_parameters() if p.dim() == 2 and p.std() < 0.015}
    assert scaled == {f"blocks.{i}.{name}.weight" for i in range(3) for name in ("attention.wo", "mlp.down")}


def test_tied_head_is_one_parameter_counted_once():
    tied, free = Llama(dataclasses.replace(TINY, tie_embeddings=True), eager), Llama(TINY, eager)
    assert tied.lm_head.weight is tied.embed.weight
    assert tied.to(torch.float64).lm_head.weight is tied.embed.weight  # moving keeps the tie
    count = [sum(p.numel() for p in model.parameters()) for model in (free, tied)]
    assert count[0] - count[1] == TINY.vocab_size * TINY.dim
    assert len({id(p) for p in tied.parameters()}) == len(list(tied.parameters())) == len(list(free.parameters())) - 1


def test_tied_gradient_is_the_sum_of_the_embeddings_and_the_heads():
    tied = llama(tie_embeddings=True)
    free = llama()
    free.load_state_dict(tied.state_dict())
    for model in (tied, free):
        model(some_tokens(), some_tokens(seed=1)).backward()
    torch.testing.assert_close(tied.embed.weight.grad, free.embed.weight.grad + free.lm_head.weight.grad)


def test_rotary_table_is_no_part_of_the_state_dict():
    assert {name for name in llama().state_dict() if "." not in name} == {"norm"}


# The same function as other implementations


def hugging_face(model):
    """transformers' LlamaForCausalLM with the weights of a model.Llama."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed; reference_llama.py stands in")
    c, mine = model.config, model.state_dict()
    config = transformers.LlamaConfig(
        vocab_size=c.vocab_size,
        hidden_size=c.dim,
        intermediate_size=c.hidden_dim,
        num_hidden_layers=c.n_layers,
        num_attention_heads=c.n_heads,
        num_key_value_heads=c.n_kv_heads,
        max_position_embeddings=c.seq_len,
        rms_norm_eps=c.norm_eps,
        tie_word_embeddings=c.tie_embeddings,
        head_dim=c.head_dim,
        attention_bias=c.attention_bias,
        mlp_bias=c.mlp_bias,
        rope_parameters={
            "rope_type": "llama3" if c.rope_original_seq_len else "linear" if c.rope_factor != 1 else "default",
            "rope_theta": c.rope_theta,
            "factor": c.rope_factor,
            "low_freq_factor": c.rope_low_freq_factor,
            "high_freq_factor": c.rope_high_freq_factor,
            "original_max_position_embeddings": c.rope_original_seq_len,
        },
    )
    theirs = {"model.embed_tokens.weight": mine["embed.weight"], "model.norm.weight": mine["norm"]}
    theirs["lm_head.weight"] = mine["lm_head.weight"]
    heads = [n * c.head_dim for n in (c.n_heads, c.n_kv_heads, c.n_kv_heads)]
    for i in range(c.n_layers):
        here, there = f"blocks.{i}.", f"model.layers.{i}."
        for kind in ["weight"] + ["bias"] * c.attention_bias:
            for name, w in zip("qkv", mine[f"{here}attention.wqkv.{kind}"].split(heads), strict=True):
                theirs[f"{there}self_attn.{name}_proj.{kind}"] = w
            theirs[f"{there}self_attn.o_proj.{kind}"] = mine[f"{here}attention.wo.{kind}"]
        for kind in ["weight"] + ["bias"] * c.mlp_bias:
            for name, w in zip(("gate", "up"), mine[f"{here}mlp.gate_up.{kind}"].chunk(2), strict=True):
                theirs[f"{there}mlp.{name}_proj.{kind}"] = w
            theirs[f"{there}mlp.down_proj.{kind}"] = mine[f"{here}mlp.down.{kind}"]
        theirs[there + "input_layernorm.weight"] = mine[here + "attention_norm"]
        theirs[there + "post_attention_layernorm.weight"] = mine[here + "mlp_norm"]
    other = transformers.LlamaForCausalLM(config)
    other.load_state_dict(theirs)
    return other.eval()


@each_kind
@torch.no_grad()
def test_logits_equal_hugging_face(config):
    model = llama(config)
    tokens = some_tokens(T=config.seq_len)
    theirs = hugging_face(model)(tokens).logits
    # fp32: logits of size 2 at the end of sums of about 100 products; half a dozen ulps of 2.4e-7 each.
    torch.testing.assert_close(model(tokens), theirs, rtol=0, atol=3e-6)


@each_kind
@torch.no_grad()
def test_logits_equal_the_independent_reference(config):
    model, tokens = llama(config), some_tokens()
    expected = reference_logits(model.state_dict(), config, tokens)
    torch.testing.assert_close(model(tokens).double(), expected, rtol=0, atol=5e-6)
    # In float64, with a table in float64, a rounding error would be gone; a bug would keep its size.
    model = model.double()
    model.dtype = torch.float64
    angles = torch.arange(config.seq_len, dtype=torch.float64)[:, None] * torch.tensor(speeds(config), dtype=torch.float64)
    model.cos, model.sin = angles.cos(), angles.sin()
    torch.testing.assert_close(model(tokens), expected, rtol=0, atol=1e-13)


@torch.no_grad()
def test_loss_is_the_mean_cross_entropy_of_the_logits():
    model, tokens, targets = llama(), some_tokens(), some_tokens(seed=1)
    targets[:, ::3] = -100
    kept = targets != -100
    log_p = model(tokens).double().log_softmax(-1)[kept]
    expected = -log_p.gather(1, targets[kept][:, None]).mean()
    torch.testing.assert_close(model(tokens, targets).double(), expected, rtol=1e-6, atol=0)


def test_transformers_llama_is_usable_from_the_projects_root():
    pytest.importorskip("transformers", reason="transformers is not installed; what this guards cannot break")
    code = """
import data, kernels.eager
from transformers import LlamaConfig, LlamaForCausalLM
import torch
shape = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, vocab_size=9)
model = LlamaForCausalLM(LlamaConfig(**shape))
assert model(torch.arange(6)[None]).logits.shape == (1, 6, 9)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@torch.no_grad()
def test_gqa_equals_mha_with_repeated_kv_heads():
    grouped = llama(n_kv_heads=2)
    state = grouped.state_dict()
    for name, w in state.items():
        if "wqkv" in name:
            q, k, v = w.split([64, 32, 32])
            k, v = (kv.unflatten(0, (2, 16)).repeat_interleave(2, 0).flatten(0, 1) for kv in (k, v))
            state[name] = torch.cat((q, k, v))
    full = llama()
    full.load_state_dict(state)
    torch.testing.assert_close(grouped(some_tokens()), full(some_tokens()), rtol=0, atol=5e-6)


# Positions and causality


@each_kind
@torch.no_grad()
def test_changing_token_t_leaves_the_logits_before_t_bit_equal(config):
    model, tokens = llama(config), some_tokens()
    before = model(tokens)
    for t in (0, 1, 17, 39):
        changed = tokens.clone()
        changed[:, t] = (changed[:, t] + 1) % config.vocab_size
        after = model(changed)
        assert torch.equal(after[:, :t], before[:, :t])
        assert (after[:, t:] != before[:, t:]).any(-1).all(), "a later position does not see the change"


def test_rotary_table_equals_float64_within_fp32_rounding():
    config = ModelConfig()
    i = torch.arange(config.head_dim // 2, dtype=torch.float64)
    angles = torch.arange(config.seq_len, dtype=torch.float64)[:, None] * 10000 ** (-2 * i / config.head_dim)
    # An ulp or two in the frequency and one in the product make a relative error of the angle; one more in cos itself.
    bound = 2.0**-24 * (4 * angles + 1)
    cos, sin = rotary_table(config, "cpu")
    assert cos.dtype == sin.dtype == torch.float32
    assert cos.shape == sin.shape == (1024, 32)
    assert ((cos - angles.cos()).abs() <= bound).all()
    assert ((sin - angles.sin()).abs() <= bound).all()


@pytest.mark.parametrize(
    "move", [lambda m: m.to(torch.bfloat16), lambda m: m.half(), lambda m: m.double(), lambda m: m.float()]
)
def test_rotary_table_stays_fp32_and_unrounded_wherever_the_model_moves(move):
    expected = rotary_table(TINY, "cpu")
    model = move(torch.nn.Sequential(llama()))[0]  # inside another module, as DDP has it
    for table, e in zip((model.cos, model.sin), expected, strict=True):
        assert table.dtype == torch.float32
        assert torch.equal(table, e)


def test_rotary_scores_depend_on_the_offset_alone():
    config = ModelConfig(dim=64, n_heads=1, seq_len=2048)
    g = torch.Generator().manual_seed(0)
    q, k = torch.nn.functional.normalize(torch.randn(2, 1, 64, generator=g), dim=-1)
    q, k = (x.expand(1, 2048, 1, 64) for x in (q, k))  # the same q and the same k at every position
    q, k = eager.rotary(q, k, *rotary_table(config, "cpu"))
    for offset in (0, 1, 7, 100, 1000):
        scores = (q[0, offset:, 0] * k[0, : 2048 - offset, 0]).sum(-1)
        # Unit vectors, angles up to 2048 with a relative error of some 2^-24: 1.2e-4 each if all pairs turned that fast.
        # A table in bf16 spreads over 1.2e-3, angles in bf16 over 0.1.
        assert scores.max() - scores.min() < 1e-4


@torch.no_grad()
def test_attention_depends_on_relative_positions_alone():
    model, tokens = llama(), some_tokens(T=20)
    shift = 25
    cos, sin = rotary_table(model.config, "cpu")
    before = model(tokens)
    model.cos, model.sin = cos[shift:], sin[shift:]
    torch.testing.assert_close(model(tokens), before, rtol=0, atol=5e-6)


# The KV cache, generate, attention maps


@each_kind
@torch.no_grad()
def test_chunked_prefill_and_single_steps_equal_the_full_forward(config):
    model, tokens = llama(config), some_tokens(T=config.seq_len)
    cache, logits = KVCache(model, 2), []
    for chunk in tokens.split([7, 1, 12, 1, 1, 1, 20, 1, 4], dim=1):
        logits.append(model(chunk, cache=cache))
    assert cache.length == config.seq_len
    torch.testing.assert_close(torch.cat(logits, 1), model(tokens), rtol=0, atol=5e-6)


@torch.no_grad()
def test_rewound_cache_forgets_what_came_after():
    model, prefix = llama(), some_tokens(T=20)
    cache = KVCache(model, 2)
    model(prefix, cache=cache)
    for seed in (1, 2, 3):
        cache.length = 20
        query = some_tokens(T=9, seed=seed)
        expected = model(torch.cat((prefix, query), 1))[:, 20:]
        torch.testing.assert_close(model(query, cache=cache), expected, rtol=0, atol=5e-6)


@each_kind
@torch.no_grad()
def test_generate_equals_argmax_of_the_full_forward_step_by_step(config):
    model, tokens = llama(config), some_tokens(T=10)
    new = torch.stack(list(model.generate(tokens, 15)), 1)
    assert new.shape == (2, 15)
    for _ in range(15):
        tokens = torch.cat((tokens, model(tokens)[:, -1:].argmax(-1)), 1)
    assert torch.equal(new, tokens[:, 10:])


def test_generate_stops_at_the_end_of_the_context():
    model = llama()
    assert len(list(model.generate(some_tokens(T=40), 100))) == 8
    assert len(list(model.generate(some_tokens(T=48), 100))) == 0


def test_generate_draws_from_the_softmax_at_a_temperature():
    model, n = llama(seq_len=8), 20000
    prompt = torch.tensor([[3, 1, 4]])
    torch.manual_seed(0)
    draws = next(model.generate(prompt.expand(n, 3), 1, temperature=0.7))
    p = (model(prompt)[0, -1] / 0.7).softmax(-1).detach()
    share = torch.bincount(draws, minlength=50) / n
    assert ((share - p).abs() <= 5 * (p / n) ** 0.5).all()


@each_kind
@torch.no_grad()
def test_attention_maps_are_causal_probabilities_that_reproduce_the_attention(config):
    model, tokens = llama(config), some_tokens()
    maps = list(model.attention_maps(tokens))
    seen = []  # the input and output of each attention layer in a plain forward
    for block in model.blocks:
        block.attention.register_forward_hook(lambda module, args, out: seen.append((args[0], out)))
    model(tokens)
    for probs, block, (x, expected) in zip(maps, model.blocks, seen, strict=True):
        assert probs.shape == (2, config.n_heads, 40, 40)
        assert probs.dtype == torch.float32
        assert (probs.triu(1) == 0).all() and (probs >= 0).all()
        torch.testing.assert_close(probs.sum(-1), torch.ones(2, config.n_heads, 40), rtol=0, atol=1e-6)
        v = block.attention.qkv(x, model.rope(0, 40))[2].repeat_interleave(config.n_heads // config.n_kv_heads, 2)
        out = block.attention.wo(torch.einsum("bhqk,bkhd->bqhd", probs, v).flatten(2))
        torch.testing.assert_close(out, expected, rtol=0, atol=5e-6)


# Precision


def test_bf16_model_has_bf16_activations_and_fp32_parameters_loss_and_gradients():
    model = llama(dtype=torch.bfloat16)
    kinds = set()
    for module in model.modules():
        if not isinstance(module, (torch.nn.Embedding, torch.nn.ModuleList)):
            module.register_forward_hook(lambda module, args, out: kinds.update(x.dtype for x in tree_leaves(out)))
    loss = model.train()(some_tokens(), some_tokens(seed=1))
    assert loss.dtype == torch.float32
    kinds.discard(loss.dtype)  # the outermost module's
    loss.backward()
    assert kinds == {torch.bfloat16}
    for name, p in model.named_parameters():
        assert p.dtype == p.grad.dtype == torch.float32, name
        assert p.grad.abs().sum() > 0, name
    assert model(some_tokens()).dtype == torch.bfloat16


@torch.no_grad()
def test_bf16_logits_are_within_bf16_rounding_of_fp32():
    exact, rounded = llama()(some_tokens()), llama(dtype=torch.bfloat16)(some_tokens())
    # Some 30 roundings of 2^-9 each in a row, independent: 2^-9 * sqrt(30) = 1%.
    assert (rounded.float() - exact).norm() / exact.norm() < 0.02


# Attention dropout


@torch.no_grad()
def test_dropout_is_a_function_of_the_seed():
    model, tokens = llama(attn_dropout=0.25).train(), some_tokens()
    a, again, b = (model(tokens, seed=torch.tensor(seeds)) for seeds in ([5, 6], [5, 6], [5, 60]))
    assert torch.equal(a, again)
    assert torch.equal(a[0], b[0]) and not torch.equal(a[1], b[1])
    assert not torch.equal(a[0], model.eval()(tokens)[0])


@torch.no_grad()
def test_there_is_no_dropout_in_eval_mode_nor_without_a_share():
    plain = llama()(some_tokens())
    seed = torch.tensor([5, 6])
    assert torch.equal(llama(attn_dropout=0.25)(some_tokens(), seed=seed), plain)
    assert torch.equal(llama().train()(some_tokens(), seed=seed), plain)


@torch.no_grad()
def test_a_sequences_dropout_does_not_depend_on_its_batch():
    model, tokens, seed = llama(attn_dropout=0.25).train(), some_tokens(B=4), torch.tensor([1, 2**40 + 2, 77, 10**6])
    whole = model(tokens, seed=seed)
    halves = torch.cat([model(t, seed=s) for t, s in zip(tokens.split(2), seed.split(2), strict=True)])
    torch.testing.assert_close(halves, whole, rtol=0, atol=5e-6)
    order = torch.tensor([2, 0, 3, 1])
    torch.testing.assert_close(model(tokens[order], seed=seed[order]), whole[order], rtol=0, atol=5e-6)


def test_every_layer_has_its_own_dropout_mask():
    seeds = []

    class Spy:
        def __getattr__(self, name):
            return getattr(eager, name)

        def rotary_attention(self, *inputs):
            seeds.append((inputs[-2], inputs[-1].tolist()))
            return eager.rotary_attention(*inputs)

    config = dataclasses.replace(TINY, attn_dropout=0.5)
    Llama(config, Spy()).train()(some_tokens(), seed=torch.tensor([10, 900]))
    assert seeds == [(0.5, [10 + i, 900 + i]) for i in range(3)]


# Compilation and learning


@pytest.mark.parametrize("dropout", [0.0, 0.25])
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_all_blocks_compile_to_one_graph_without_a_break(mode, dropout):
    model = llama(n_layers=10, attn_dropout=dropout).train(mode == "train")  # more layers than the recompile limit of 8
    seed = torch.tensor([5, 6]) if dropout else None
    inputs, rope = [torch.randn(2, 40, 64, requires_grad=True) for _ in range(2)], model.rope(0, 40)

    def through_all_blocks():
        x, residual = inputs
        for block in model.blocks:
            x, residual = block(x, residual, model.norm, rope, seed)
        return x, residual

    expected = through_all_blocks()
    graphs = compile_blocks(model)
    torch.testing.assert_close(through_all_blocks(), expected, rtol=1e-5, atol=1e-5)
    assert graphs.frame_count == 1


def test_compiled_blocks_train_with_the_same_gradients():
    model, seed = llama(attn_dropout=0.25).train(), torch.tensor([5, 6])
    model(some_tokens(), some_tokens(seed=1), seed).backward()
    expected = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    graphs = compile_blocks(model)
    model(some_tokens(), some_tokens(seed=1), seed).backward()
    torch.testing.assert_close([p.grad for p in model.parameters()], expected, rtol=1e-5, atol=1e-6)
    assert graphs.frame_count == 1


def test_compiled_blocks_are_not_compiled_again_for_the_shapes_of_evaluation():
    model, tokens = llama(), some_tokens(T=10)
    expected = list(model.generate(tokens, 20)), list(model.attention_maps(tokens))
    graphs = compile_blocks(model)
    torch.testing.assert_close((list(model.generate(tokens, 20)), list(model.attention_maps(tokens))), expected)
    assert graphs.frame_count == 0


def compile_blocks(model):
    """Compiles as train.py does, and returns what counts the graphs."""
    torch._dynamo.reset()
    graphs = CompileCounter()
    for block in model.blocks:
        block.compile(fullgraph=True, backend=graphs)
    return graphs


def test_one_batch_is_memorized():
    torch.manual_seed(0)
    model, batch = Llama(TINY, eager), some_tokens(B=4, T=25)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    for _ in range(60):
        loss = model(batch[:, :-1], batch[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.05


# The models built by hand


@pytest.mark.parametrize("bos", [None, 0])
def test_handbuilt_heads_attend_where_they_should(bos):
    model, previous, induction = induction_model(256, 256, bos)
    first = torch.randint(1, 256, (3, 100), generator=torch.Generator().manual_seed(0))
    tokens = torch.cat((torch.zeros(3, 1, dtype=torch.int64), first, first), 1)
    maps = torch.stack(list(model.attention_maps(tokens)))  # (L, B, H, T, T)
    back_one = maps.diagonal(-1, 3, 4).mean((1, 3))  # (L, H)
    # The second copy begins at 101; there, position 101 + i should see 1 + i + 1, the token after the first occurrence.
    stripe = maps[..., 101:, :].diagonal(2, 3, 4)[..., :100].mean((1, 3))
    assert back_one[previous] > 0.99 and stripe[induction] > 0.95
    back_one[previous] = stripe[induction] = 0
    assert back_one.max() < 0.05 and stripe.max() < 0.05


def test_handbuilt_induction_model_continues_an_earlier_sequence():
    model, _, _ = induction_model(256, 512)
    g = torch.Generator().manual_seed(0)
    for _ in range(5):
        sequences = torch.randint(256, (25, 18), generator=g)
        for i in (0, 12, 24):
            prompt = torch.cat((sequences.flatten(), sequences[i, :12]))[None]
            assert torch.cat(list(model.generate(prompt, 6))).tolist() == sequences[i, 12:].tolist()


@torch.no_grad()
def test_handbuilt_uniform_model_prefers_no_token_and_no_position():
    model, tokens = uniform_model(64, 32), some_tokens(V=64, T=32)
    assert (model(tokens) == 0).all()
    uniform = torch.ones(32, 32).tril() / torch.arange(1, 33)[:, None]
    for probs in model.attention_maps(tokens):
        torch.testing.assert_close(probs, uniform.expand_as(probs))

"""Hugging Face folders: what transformers makes of ours, and we of its. Nothing here asks the network."""

import dataclasses
import io
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import sentencepiece
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import eval_copy
import sample
from cli import run_command
from config import ROOT, Config, ModelConfig, from_dict
from data import prepare
from data.tokenizer import get_tokenizer, load_tokenizer, tokenizer_from_state
from data.tokenizer_kinds import HEX, Bytes, Chars, Ids, SentencePiece, Tiktoken
from errors import UserError
from hf import export
from hf import folder as huggingface
from kernels import eager
from model import Llama, rotary_table
from runtime import checkpoint
from tests.test_data_tokenizer import ANY_TEXT, NASTY, TOKENS, ranks
from tests.test_train import run

safetensors = pytest.importorskip("safetensors.torch", reason="safetensors is not installed: Hugging Face folders need it")

SHAPE = dict(dim=32, n_layers=2, n_heads=4, n_kv_heads=2, hidden_dim=48, seq_len=64, norm_eps=1e-5, rope_theta=5e5)
SHAPES = {
    "grouped": SHAPE,
    "tied": SHAPE | {"tie_embeddings": True, "n_kv_heads": 1},
    "multi-head": SHAPE | {"n_kv_heads": 4, "rope_theta": 1e4},
    # One frequency of 8 is kept, one interpolated, and 6 are divided.
    "llama3": SHAPE | {"head_dim": 16, "rope_factor": 8.0, "rope_original_seq_len": 40, "attention_bias": True},
    "odd": dict(dim=48, n_layers=5, n_heads=6, n_kv_heads=2, head_dim=40, hidden_dim=50, seq_len=64, tie_embeddings=True,
                rope_factor=2.5, mlp_bias=True),
}  # fmt: skip
ROPE_PARAMETERS = {
    "llama3": dict(rope_type="llama3", factor=8, low_freq_factor=1, high_freq_factor=4, original_max_position_embeddings=40),
    "odd": dict(rope_type="linear", factor=2.5),
}
each_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
# Of published models, without most of their layers, tokens and positions. "odd": nothing is a power of two, all is scaled.
LLAMA32 = dict(rope_type="llama3", rope_theta=5e5, factor=32.0, low_freq_factor=1.0, high_freq_factor=4.0)
LLAMA32 |= dict(original_max_position_embeddings=8192)
PUBLISHED = {
    "Llama-3.2-1B": dict(hidden_size=2048, num_attention_heads=32, num_key_value_heads=8, head_dim=64, intermediate_size=8192,
                         tie_word_embeddings=True, rope_parameters=LLAMA32, max_position_embeddings=131072),
    "SmolLM2-135M": dict(hidden_size=576, num_attention_heads=9, num_key_value_heads=3, intermediate_size=1536,
                         tie_word_embeddings=True, rope_parameters=dict(rope_type="default", rope_theta=1e5),
                         max_position_embeddings=8192),
    "TinyLlama": dict(hidden_size=2048, num_attention_heads=32, num_key_value_heads=4, intermediate_size=5632),
    "odd": dict(hidden_size=96, num_attention_heads=6, num_key_value_heads=2, head_dim=40, intermediate_size=200,
                tie_word_embeddings=True, attention_bias=True, mlp_bias=True,
                rope_parameters=dict(rope_type="linear", rope_theta=1e4, factor=2.5)),
}  # fmt: skip


@pytest.fixture(scope="module")
def transformers():
    os.environ["HF_HUB_OFFLINE"] = "1"  # read when it is imported
    return pytest.importorskip("transformers", reason="transformers is not installed: what it makes of a folder is untested")


def saved(path, tokenizer, step=7, seed=0, **shape):
    """A checkpoint of a model whose weights are large enough for the logits to differ; returns the model."""
    torch.manual_seed(seed)
    model = Llama(ModelConfig(**SHAPE | shape | {"vocab_size": tokenizer.size}), eager).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(5) if p.dim() > 1 else p.add_(torch.randn_like(p) / 4)
    config = dataclasses.asdict(Config(**dataclasses.asdict(model.config)))
    state = {"model": model.state_dict(), "step": step, "config": config, "tokenizer": tokenizer.state()}
    path.parent.mkdir(parents=True, exist_ok=True)
    checkpoint.save(path, state)
    return model


@pytest.fixture
def folder(tmp_path):
    saved(tmp_path / "run/ckpt.pt", Bytes())
    export.export(tmp_path / "run", tmp_path / "out")
    return tmp_path / "out"


def some_tokens(size=257, T=64):
    return torch.randint(size, (3, T), generator=torch.Generator().manual_seed(1))


# The same function


# fp32: logits of size 4 at the end of sums of about 50 products; half a dozen ulps of 4.8e-7 each.
CLOSE = dict(rtol=0, atol=3e-6)


@each_shape
@torch.no_grad()
def test_transformers_gives_the_logits_of_what_is_exported(transformers, tmp_path, shape):
    model, tokens = saved(tmp_path / "run/ckpt.pt", Bytes(), **shape), some_tokens()
    assert run_command(export.main, [str(tmp_path / "run"), str(tmp_path / "out")]) == 0
    theirs, loading = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(loading.values()), loading
    assert theirs.dtype == torch.float32
    torch.testing.assert_close(model(tokens), theirs(tokens).logits, **CLOSE)


@pytest.mark.parametrize(("shape", "shard"), [*zip(SHAPES, ["1GB"] * len(SHAPES), strict=True), ("odd", "20KB")])
@torch.no_grad()
def test_what_transformers_saves_is_read_to_the_same_logits(transformers, tmp_path, shape, shard):
    c = ModelConfig(**SHAPES[shape] | {"vocab_size": 257})
    names = {theirs: getattr(c, ours) for ours, theirs in huggingface.FIELDS.items()}
    rope = ROPE_PARAMETERS.get(shape, {"rope_type": "default"}) | {"rope_theta": c.rope_theta}
    theirs = random_llama(transformers, tmp_path / "hf", shard, **names, rope_parameters=rope)
    assert (tmp_path / "hf" / huggingface.INDEX).exists() == (shard == "20KB")
    model, tokenizer, step = eval_copy.load(tmp_path / "hf", device="cpu")
    assert (model.config, tokenizer.kind, tokenizer.size, step) == (c, "ids", 257, 0)
    assert (model.lm_head.weight is model.embed.weight) == c.tie_embeddings
    torch.testing.assert_close(model(some_tokens()), theirs(some_tokens()).logits, **CLOSE)


def random_llama(transformers, folder, shard="1GB", dtype=torch.float32, **shape):
    """A folder of random weights, norms and biases included, as transformers writes it; returns its model in fp32."""
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape, initializer_range=0.1)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) / 10 if p.dim() == 1 else 0)
            p.data = p.data.to(dtype)  # of the parameters alone: model.to(bf16) rounds the rotary frequencies
    model.save_pretrained(folder, max_shard_size=shard)
    for p in model.parameters():
        p.data = p.data.float()
    return model


@pytest.mark.parametrize(
    ("name", "layers", "vocab", "T"),
    [
        ("Llama-3.2-1B", 1, 1000, 512),
        ("SmolLM2-135M", 3, 1000, 512),
        ("TinyLlama", 1, 1000, 128),
        ("odd", 5, 128256, 32),  # more ids than uint16 holds
        pytest.param("Llama-3.2-1B", 3, 128256, 512, marks=pytest.mark.soak),
        pytest.param("SmolLM2-135M", 30, 49152, 512, marks=pytest.mark.soak),
        pytest.param("TinyLlama", 4, 32000, 512, marks=pytest.mark.soak),
    ],
)
@torch.no_grad()
def test_logits_of_published_shapes_are_those_of_transformers(transformers, tmp_path, name, layers, vocab, T):
    shape = PUBLISHED[name] | dict(num_hidden_layers=layers, vocab_size=vocab, rms_norm_eps=1e-5)
    theirs = random_llama(transformers, tmp_path, dtype=torch.bfloat16, **shape)
    model, _, _ = eval_copy.load(tmp_path, device="cpu")
    tokens = torch.randint(vocab, (1, T), generator=torch.Generator().manual_seed(1))
    expected = theirs(tokens).logits
    # Both round sums of up to 8,192 products to 24 bits, in different orders: about 1e-6 of the largest, however deep.
    torch.testing.assert_close(model(tokens), expected, rtol=0, atol=1e-5 * expected.abs().max().item())


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_rotary_table_is_that_of_transformers_bit_for_bit(transformers, name):
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    config = transformers.LlamaConfig(**{"max_position_embeddings": 2048} | PUBLISHED[name])
    c = from_dict(huggingface._fields(json.loads(config.to_json_string()) | {"vocab_size": 9}), ModelConfig)
    cos, sin = LlamaRotaryEmbedding(config)(torch.zeros(()), torch.arange(2048)[None])
    ours = rotary_table(dataclasses.replace(c, seq_len=2048), "cpu")
    assert torch.equal(ours[0], cos[0, :, : c.head_dim // 2]) and torch.equal(ours[1], sin[0, :, : c.head_dim // 2])


@each_shape
@torch.no_grad()
def test_an_exported_checkpoint_comes_back_bit_for_bit(tmp_path, shape):
    model = saved(tmp_path / "run/ckpt.pt", Chars(20), **shape)
    export.export(tmp_path / "run/ckpt.pt", tmp_path / "out")
    state, before = huggingface.load(tmp_path / "out"), huggingface.load(tmp_path / "run")
    assert state["model"].keys() == before["model"].keys() and state["tokenizer"] == before["tokenizer"]
    assert all(torch.equal(state["model"][name], w) for name, w in before["model"].items())
    again, tokenizer, step = eval_copy.load(tmp_path / "out", device="cpu", ops="eager")
    assert again.config == model.config and step == 0 and tokenizer.encode("abc") == [0, 1, 2]
    assert torch.equal(again(some_tokens(21)), model(some_tokens(21)))
    assert eval_copy.main([str(tmp_path / "out"), "--samples=2", "--device=cpu"]) == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@torch.no_grad()
def test_half_precision_weights_keep_their_dtype_in_memory(folder, dtype):
    tensors = safetensors.load_file(folder / "model.safetensors")
    safetensors.save_file({name: w.to(dtype) for name, w in tensors.items()}, folder / "model.safetensors")
    state, (model, _, _) = huggingface.read(folder)["model"], eval_copy.load(folder, device="cpu")
    assert all(w.dtype == dtype for w in [*state.values(), *model.parameters()])
    assert torch.equal(state["embed.weight"], tensors["model.embed_tokens.weight"].to(dtype))
    before = model(some_tokens())
    assert before.dtype == torch.float32 and torch.equal(model.float()(some_tokens()), before)


def test_shards_and_folders_of_older_versions_are_read(folder):
    before, tensors = huggingface.read(folder), safetensors.load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    names = sorted(tensors)
    parts = {"a.safetensors": names[:7], "b.safetensors": names[7:]}
    for file, part in parts.items():
        safetensors.save_file({name: tensors[name] for name in part}, folder / file)
    index = {"weight_map": {name: file for file, part in parts.items() for name in part}}
    (folder / huggingface.INDEX).write_text(json.dumps(index))
    config = json.loads((folder / "config.json").read_text())
    for name in ("head_dim", "attention_bias", "mlp_bias", "hidden_act", "tie_word_embeddings", "architectures", "dtype"):
        del config[name]
    config |= {"rope_scaling": None, "rope_theta": config.pop("rope_parameters")["rope_theta"], "pretraining_tp": 1}
    (folder / "config.json").write_text(json.dumps(config))
    after = huggingface.read(folder)
    assert after["config"] == before["config"] and after["tokenizer"] == before["tokenizer"]
    assert all(torch.equal(after["model"][name], w) for name, w in before["model"].items())


@pytest.fixture
def tied(tmp_path):
    """A folder with tied embeddings, and its tensors."""
    saved(tmp_path / "ckpt.pt", Bytes(), **SHAPES["tied"])
    export.export(tmp_path / "ckpt.pt", tmp_path / "tied")
    return tmp_path / "tied", safetensors.load_file(tmp_path / "tied/model.safetensors")


def test_a_tied_matrix_is_read_under_either_name_or_both_and_refused_if_they_differ(tied):
    folder, tensors = tied
    before, embed = huggingface.read(folder), tensors["model.embed_tokens.weight"]
    both = tensors | {"lm_head.weight": embed.clone()}
    for stored in (both, {name: w for name, w in both.items() if name != "model.embed_tokens.weight"}):
        safetensors.save_file(stored, folder / "model.safetensors")
        after = huggingface.read(folder)
        assert all(torch.equal(after["model"][name], w) for name, w in before["model"].items())
    for head in (embed + 1, embed.half(), embed[:-1]):
        safetensors.save_file(tensors | {"lm_head.weight": head.clone()}, folder / "model.safetensors")
        assert "lm_head.weight differs from embed_tokens.weight; set tie_word_embeddings to false" in line(folder)


# The same ids


@pytest.fixture(scope="module", params=["bytes", "chars", "bpe", "llama", "no byte fallback", "tiktoken"])
def tokenizer(request, corpus, bpe):
    if request.param in ("llama", "no byte fallback"):
        file = io.BytesIO()
        options = dict(model_type="bpe", vocab_size=500, normalization_rule_name="identity", remove_extra_whitespaces=False)
        options |= dict(byte_fallback=request.param == "llama", num_threads=1, minloglevel=2)
        lines = iter("\n".join([*corpus, HEX]).split("\n"))
        sentencepiece.SentencePieceTrainer.train(sentence_iterator=lines, model_writer=file, **options)
        return SentencePiece(file.getvalue())
    if request.param == "bpe":
        return SentencePiece(bpe)
    return {"bytes": Bytes(), "chars": Chars(80), "tiktoken": Tiktoken(ranks(TOKENS))}[request.param]


@pytest.fixture(scope="module")
def both(tokenizer, transformers, tmp_path_factory):
    """A vocabulary, and what AutoTokenizer makes of it."""
    path = tmp_path_factory.mktemp("tokenizer")
    saved(path / "run/ckpt.pt", tokenizer)
    export.export(path / "run", path / "out")
    return tokenizer, transformers.AutoTokenizer.from_pretrained(path / "out")


def texts(tokenizer):
    return ["", "text to go on with", tokenizer.alphabet] if tokenizer.kind == "chars" else NASTY


def test_autotokenizer_gives_our_ids_with_bos_before_them_and_the_same_text_back(both):
    tokenizer, theirs = both
    assert (len(theirs), theirs.bos_token_id, theirs.eos_token_id) == (tokenizer.size, tokenizer.bos, tokenizer.eos)
    for text in texts(tokenizer):
        ids = [int(i) for i in tokenizer.encode(text)]
        assert theirs.encode(text, add_special_tokens=False) == ids, text
        assert theirs(text).input_ids == [tokenizer.bos, *ids], text
        assert theirs.decode(ids, skip_special_tokens=True) == tokenizer.decode(ids), text


@settings(derandomize=True, deadline=None, database=None, max_examples=100)
@given(text=ANY_TEXT, some=st.lists(st.sampled_from([" the", "th", "a", "b", "    ", "\r\n", "你", "12", "\t", "lo", "xx"])))
def test_autotokenizer_gives_our_ids_of_any_text(both, text, some):
    tokenizer, theirs = both
    for whole in ["".join(some)] if tokenizer.kind == "chars" else [text, "".join(some), "".join(some) + text]:
        whole = "".join(c for c in whole if c in tokenizer.alphabet) if tokenizer.kind == "chars" else whole
        assert theirs.encode(whole, add_special_tokens=False) == [int(i) for i in tokenizer.encode(whole)]


def test_autotokenizer_gives_our_ids_of_whole_documents(both, corpus):
    tokenizer, theirs = both
    if tokenizer.kind != "chars":
        for text in corpus + [(ROOT / "train.py").read_text()]:
            assert theirs.encode(text, add_special_tokens=False) == [int(i) for i in tokenizer.encode(text)]


def test_a_character_outside_the_alphabet_is_an_error_there_too(both):
    tokenizer, theirs = both
    if tokenizer.kind == "chars":
        with pytest.raises(Exception, match="(?i)wordlevel error"):
            theirs.encode("a\nb")


def test_each_tokenizer_comes_back_as_it_was(tokenizer, tmp_path):
    saved(tmp_path / "run/ckpt.pt", tokenizer)
    export.export(tmp_path / "run", tmp_path / "out")
    assert huggingface.read(tmp_path / "out")["tokenizer"] == tokenizer.state()
    assert (tmp_path / "out/tokenizer.json").exists()


@pytest.mark.parametrize("options", [dict(model_type="unigram"), dict(normalization_rule_name="nmt_nfkc"),
                                     dict(user_defined_symbols=["<|a|>"])], ids=str)  # fmt: skip
def test_a_sentencepiece_model_that_cannot_be_converted_is_copied_and_reported(options, corpus, tmp_path, capsys):
    file = io.BytesIO()
    lines = iter("\n".join(corpus).split("\n"))
    options = dict(model_type="bpe", vocab_size=400, normalization_rule_name="identity") | options
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=lines, model_writer=file, byte_fallback=True, num_threads=1, minloglevel=2, **options
    )
    saved(tmp_path / "run/ckpt.pt", SentencePiece(file.getvalue()))
    assert run_command(export.main, [str(tmp_path / "run"), str(tmp_path / "out")]) == 0
    assert "use the sentencepiece package with tokenizer.model" in capsys.readouterr().out
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["config.json", "model.safetensors", "tokenizer.model"]
    assert eval_copy.load(tmp_path / "out", device="cpu")[1].model == file.getvalue()


def test_a_checkpoint_without_a_tokenizer_says_to_pass_ids(tmp_path, capsys):
    saved(tmp_path / "ckpt.pt", Ids(50))
    assert run_command(export.main, [str(tmp_path / "ckpt.pt"), str(tmp_path / "out")]) == 0
    assert "no tokenizer was written, because the checkpoint has none (ids): pass token ids" in capsys.readouterr().out
    assert huggingface.read(tmp_path / "out")["tokenizer"] == {"kind": "ids", "size": 50}


def test_a_prompt_that_is_not_utf8_is_refused_in_one_line(folder, capsys):
    assert run_command(sample.main, [str(folder), "--prompt=a\udc80", "--device=cpu"]) == 2
    assert capsys.readouterr().err == "prompt: the text is not valid UTF-8\n"


# tokenizer.json of others


SPECIAL = ["<|begin_of_text|>", "<|end_of_text|>", "<|reserved_0|>"]


@pytest.fixture(scope="module")
def byte_level(corpus):
    """A tokenizer.json like Llama 3's: byte-level BPE, and after it special tokens, the first of which is put before a text."""
    tokenizers = pytest.importorskip("tokenizers", reason="tokenizers is not installed: tokenizer.json cannot be read")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(corpus, trainer)
    tokenizer.add_special_tokens(SPECIAL)
    bos = SPECIAL[0]
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(f"{bos} $A", special_tokens=[(bos, 400)])
    tokenizer.enable_truncation(5)  # as some folders have both
    tokenizer.enable_padding(length=50)
    return tokenizer.to_str()


def with_tokenizer_json(folder, text, size=410):
    """Makes `folder` one of another's Llama: nothing but config.json names the tokenizer's bos."""
    saved(folder / "ckpt.pt", Ids(size))
    export.export(folder / "ckpt.pt", folder / "hf")
    config = json.loads((folder / "hf/config.json").read_text()) | {"bos_token_id": 400, "eos_token_id": [401, 402]}
    del config["copyllama_tokenizer"]
    (folder / "hf/config.json").write_text(json.dumps(config))
    (folder / "hf/tokenizer.json").write_text(text)
    return folder / "hf"


def test_tokenizer_json_gives_the_text_ids_special_tokens_and_hex_digits_of_transformers(transformers, byte_level, tmp_path):
    folder = with_tokenizer_json(tmp_path, byte_level)
    _, tokenizer, _ = eval_copy.load(folder, device="cpu")
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
    assert (tokenizer.size, tokenizer.bos, tokenizer.eos, tokenizer.special) == (403, 400, 401, {400, 401, 402})
    for text in [*NASTY, "<|end_of_text|> is text"]:
        ids = tokenizer.encode(text)
        assert ids == theirs.encode(text, add_special_tokens=False, split_special_tokens=True)
        assert tokenizer.decode([400, *ids, 401]) == text
    assert [tokenizer.decode([i]) for i in tokenizer.hex_ids()] == list(HEX)
    assert eval_copy.vocabulary(tokenizer).ids.tolist() == list(range(400))
    assert tokenizer_from_state(tokenizer.state()).state() == tokenizer.state()


def test_a_folder_with_tokenizer_json_continues_a_prompt_and_is_scored_on_its_hex_digits(byte_level, tmp_path, capsys):
    folder = str(with_tokenizer_json(tmp_path, byte_level))
    assert run_command(eval_copy.main, [folder, "--prompt", "a text", "--device=cpu"]) == 0
    assert capsys.readouterr().out.startswith("a text")
    assert run_command(eval_copy.main, [folder, "--samples=20", "--device=cpu"]) == 0
    out, err = capsys.readouterr()
    assert "hex16 (16 ids)" in out and "warning" not in err


def test_a_tokenizer_model_that_is_not_sentencepieces_yields_to_tokenizer_json_and_else_is_refused(
    byte_level, tmp_path, capsys
):
    folder = with_tokenizer_json(tmp_path, byte_level)
    (folder / "tokenizer.model").write_bytes(ranks(TOKENS))  # as Llama 3's own
    assert eval_copy.load(folder, device="cpu")[1].kind == "tokenizers"
    (folder / "tokenizer.json").unlink()
    assert run_command(eval_copy.main, [str(folder), "--device=cpu"]) == 2
    assert capsys.readouterr().err == f"{folder}: {len(ranks(TOKENS))} bytes that are not a sentencepiece model\n"


def test_special_tokens_beyond_the_model_are_left_out_and_others_refused(byte_level, tmp_path, capsys):
    more = json.loads(byte_level)
    more["added_tokens"].append(more["added_tokens"][-1] | {"id": 403, "content": "[PAD]"})
    folder = with_tokenizer_json(tmp_path, json.dumps(more), size=403)
    assert eval_copy.load(folder, device="cpu")[1].size == 403
    more["added_tokens"][-1]["special"] = False
    (folder / "tokenizer.json").write_text(json.dumps(more))
    assert run_command(eval_copy.main, [str(folder), "--device=cpu"]) == 2
    assert "its tokenizer has 404 ids, but its model has 403" in capsys.readouterr().err


def test_a_tokenizer_json_that_cannot_be_read_is_refused_in_one_line(byte_level, tmp_path, capsys, monkeypatch):
    folder = with_tokenizer_json(tmp_path, '{"model": 3}')
    assert run_command(eval_copy.main, [str(folder), "--device=cpu"]) == 2
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    assert run_command(eval_copy.main, [str(folder), "--device=cpu"]) == 2
    damaged, missing = capsys.readouterr().err.strip().splitlines()
    assert "not a tokenizer.json that" in damaged and "pip install '.[hf]'" in missing
    (folder / "config.json").write_text("[" * 100_000)
    for _ in range(2):
        with pytest.raises(UserError, match="tokenizer.json: expected a readable config.json beside it"):
            get_tokenizer(str(folder / "tokenizer.json"))
        (folder / "config.json").unlink(missing_ok=True)


def test_a_folder_without_a_tokenizer_says_so_in_one_line(tmp_path, capsys):
    folder = with_tokenizer_json(tmp_path, "")
    (folder / "tokenizer.json").unlink()
    assert run_command(eval_copy.main, [str(folder), "--samples=2", "--device=cpu"]) == 0
    assert f"warning: {folder} has neither tokenizer.json nor tokenizer.model: " in capsys.readouterr().err
    assert run_command(eval_copy.main, [str(folder), "--prompt=x", "--device=cpu"]) == 2
    assert "without a tokenizer (" in (error := capsys.readouterr().err) and len(error.splitlines()) == 1


def test_its_text_is_prepared_and_its_llama_trains_on_it_and_is_exported_with_it(byte_level, tmp_path, capsys):
    folder, data = with_tokenizer_json(tmp_path, byte_level), tmp_path / "data"
    (tmp_path / "text").mkdir()
    for i in range(20):
        (tmp_path / f"text/{i}.txt").write_text(f"some text to train on, number {i}\n" * 20)
    source = f"--tokenizer={folder}/tokenizer.json"
    assert run_command(prepare.main, ["text", str(tmp_path / "text"), source, f"--out={data}", "--val_fraction=0.3"]) == 0
    assert load_tokenizer(data).decode(np.fromfile(data / "val.bin", np.uint16)).startswith("some text to train on, number")
    settings = SHAPE | dict(data=str(data), out_dir=str(tmp_path / "more"), init_from=str(folder), vocab_size=410)
    run(
        settings
        | dict(batch_size=2, max_steps=1, warmup_steps=0, eval_interval=0, copy_eval_interval=0, device="cpu", compile="off")
    )
    assert "starting from the weights of" in (out := capsys.readouterr().out) and "warning" not in out
    export.export(tmp_path / "more", tmp_path / "exported")
    assert (tmp_path / "exported/tokenizer.json").read_text() == byte_level
    assert '"bos_token": "<|begin_of_text|>"' in (tmp_path / "exported/tokenizer_config.json").read_text()
    theirs = get_tokenizer(str(folder / "tokenizer.json"))
    assert eval_copy.load(tmp_path / "exported", device="cpu")[1].state() == theirs.state()


# Mistakes


def line(folder):
    with pytest.raises(UserError) as e:
        huggingface.load(folder)
    assert "\n" not in str(e.value) and str(folder) in str(e.value)
    return str(e.value)


LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "rope_theta": 5e5}
YARN = {"rope_type": "yarn", "factor": 8.0}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"model_type": "mistral"}, "model_type=mistral: expected llama"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "expected LlamaForCausalLM"),
        ({"hidden_act": "gelu"}, 'hidden_act="gelu": expected "silu"'),
        ({"quantization_config": {"bits": 4}}, "quantization_config="),
        ({"sliding_window": 4096}, "sliding_window=4096: expected null"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5: expected 1.0"),
        ({"rope_scaling": YARN}, '{"rope_type": "yarn", "factor": 8.0}: rope_type must be default, linear or llama3'),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, '"dynamic", "factor": 2.0}: rope_type must be default'),
        ({"rope_scaling": {"type": "linear"}}, "with all its parameters"),
        ({"rope_parameters": LLAMA3}, "with all its parameters"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, '{"partial_rotary_factor": 0.5}: rope_type must be default'),
        ({"rope_parameters": {"full_attention": LLAMA3}}, "rope_type must be default, linear or llama3"),
        ({"rope_parameters": 3}, "unsupported RoPE scaling 3: rope_type must be default"),
        ({"rope_parameters": {"rope_type": ["llama3"]}}, "rope_type must be default, linear or llama3"),
        ({"rope_scaling": {"type": "linear", "factor": 0}}, "rope_factor=0.0: must be above 0"),
        ({"head_dim": 16}, "q_proj.weight has shape (32, 32), expected (64, 32)"),
        ({"attention_bias": True}, "tensor model.layers.0.self_attn.q_proj.bias is missing"),
        ({"vocab_size": 128256}, "embed_tokens.weight has shape (257, 32), expected (128256, 32)"),
        ({"bos_token_id": 257}, "bos_token_id=257, eos_token_id=null: expected ids below vocab_size=257"),
        ({"copyllama_tokenizer": {"kind": [1]}}, "names no tokenizer"),
        ({"hidden_size": None}, "missing hidden_size"),
        ({"hidden_size": "32"}, "expected int, got str"),
        ({"num_hidden_layers": 3}, "tensor model.layers.2."),
        (
            {"num_hidden_layers": 1},
            "unexpected tensor model.layers.1.input_layernorm.weight: config.json describes no such parameter",
        ),
        ({"intermediate_size": 50}, "gate_proj.weight has shape (48, 32), expected (50, 32)"),
    ],
)
def test_an_unsupported_llama_is_refused_in_one_line(folder, change, said):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | change))
    assert said in line(folder)


def test_damaged_missing_and_foreign_files_are_refused_in_one_line(folder):
    weights, whole = folder / "model.safetensors", (folder / "model.safetensors").read_bytes()
    for data in (b"", whole[:100], whole[:-1], b"\xff" * 1000, whole + b"x"):
        weights.write_bytes(data)
        assert "model.safetensors: damaged, or not safetensors" in line(folder)
    tensors = safetensors.load(whole)
    safetensors.save_file({k: v for k, v in tensors.items() if k != "lm_head.weight"}, weights)
    assert "tensor lm_head.weight is missing" in line(folder)
    safetensors.save_file(tensors | {"model.norm.bias": torch.ones(2)}, weights)
    assert "unexpected tensor model.norm.bias" in line(folder)
    safetensors.save_file(tensors | {"model.norm.weight": torch.ones(32, dtype=torch.int8)}, weights)
    assert "model.norm.weight is stored as I8" in line(folder)
    weights.unlink()
    assert "neither model.safetensors nor model.safetensors.index.json" in line(folder)
    index = folder / huggingface.INDEX
    for weight_map in (None, {}, [], {"a": 1}, {"a": "../x.safetensors"}):
        index.write_text(json.dumps({"weight_map": weight_map}))
        assert "its weight_map does not name files of this folder" in line(folder)
    index.write_text(json.dumps({"weight_map": {"lm_head.weight": "model-1.safetensors"}}))
    assert "model-1.safetensors: no such file" in line(folder)
    for text in ("", "[]", "{", '"model_type"', '{"model_type": ' + "[" * 100_000):
        (folder / "config.json").write_text(text)
        line(folder)


def test_without_the_package_one_line_names_it(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(UserError, match="needs safetensors, which is not installed: pip install"):
        huggingface.read(folder)


def test_a_run_directory_is_no_hugging_face_folder(tmp_path):
    saved(tmp_path / "run/ckpt.pt", Bytes())
    (tmp_path / "run/config.json").write_text('{"dim": 32}')
    assert huggingface.load(tmp_path / "run")["step"] == 7
    (tmp_path / "run/ckpt.pt").unlink()
    assert "run: holds neither ckpt.pt nor a Hugging Face model" in line(tmp_path / "run")


def test_export_writes_a_new_or_empty_folder_whole_or_not_at_all(tmp_path, capsys, monkeypatch):
    saved(tmp_path / "ckpt.pt", Bytes())
    path, out = str(tmp_path / "ckpt.pt"), tmp_path / "new/out"
    with monkeypatch.context() as m:
        m.setattr(huggingface, "_config_json", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run_command(export.main, [path, str(out)])
    safetensors = pytest.importorskip("safetensors", reason="safetensors is not installed: no folder can be written")

    def full(*_):
        raise safetensors.SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)\n...")

    with monkeypatch.context() as m:
        m.setattr("safetensors.torch.save_file", full)
        assert run_command(export.main, [path, str(out)]) == 4
    assert capsys.readouterr().err.endswith(
        "No space left on device (os error 28); make room, then run the same command again\n"
    )
    assert list((tmp_path / "new").iterdir()) == []
    out.mkdir()
    assert run_command(export.main, [path, str(out)]) == 0 and "LlamaForCausalLM.from_pretrained" in capsys.readouterr().out
    assert len({(out / name).stat().st_mode for name in ("config.json", "model.safetensors")}) == 1
    before = (out / "model.safetensors").read_bytes()
    for source, target in ((path, out), (path, tmp_path / "ckpt.pt"), ("nowhere", tmp_path / "x"), (out, tmp_path / "x")):
        assert run_command(export.main, [str(source), str(target)]) == 2
        assert len(capsys.readouterr().err.strip().splitlines()) == 1
    assert run_command(export.main, [str(out), str(tmp_path / "x")]) == 2
    assert "already a Hugging Face folder; hf.export takes a checkpoint" in capsys.readouterr().err
    assert (out / "model.safetensors").read_bytes() == before and list((tmp_path / "new").iterdir()) == [out]
    state = checkpoint.load(path)
    state["model"]["norm"] = torch.ones(3)
    checkpoint.save(tmp_path / "bad.pt", state)
    assert run_command(export.main, [str(tmp_path / "bad.pt"), str(tmp_path / "x")]) == 2
    assert "norm: missing, or its shape is not" in capsys.readouterr().err and not (tmp_path / "x").exists()


def test_the_command_runs_from_the_projects_root(tmp_path):
    saved(tmp_path / "ckpt.pt", Bytes())
    argv = [sys.executable, "-m", "hf.export", str(tmp_path / "ckpt.pt"), str(tmp_path / "out")]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert "AutoTokenizer.from_pretrained" in done.stdout

"""Llama folders as Hugging Face's transformers writes and reads them: config.json, safetensors in one file or in shards, and
tokenizer.json or tokenizer.model.

Both sides lay out a head's channels in halves for the rotary embedding (kernels.eager.rotary), so weights are copied as they
are; q, k and v are one matrix here and three there, as are gate and up.
"""

import contextlib
import dataclasses
import json
import os
import shutil
from pathlib import Path

import torch

from config import ModelConfig, from_checkpoint, from_dict
from data.tokenizer import KINDS
from data.tokenizer_json import TokenizerJson
from data.tokenizer_kinds import SentencePiece
from errors import RunFailed, UserError, about, first_line, require
from hf import tokenizer as hf_tokenizer
from runtime import checkpoint

INDEX, WEIGHTS = "model.safetensors.index.json", "model.safetensors"
FIELDS = {
    "dim": "hidden_size", "n_layers": "num_hidden_layers", "n_heads": "num_attention_heads",
    "n_kv_heads": "num_key_value_heads", "head_dim": "head_dim", "hidden_dim": "intermediate_size", "vocab_size": "vocab_size",
    "seq_len": "max_position_embeddings", "norm_eps": "rms_norm_eps",
    "tie_embeddings": "tie_word_embeddings", "attention_bias": "attention_bias", "mlp_bias": "mlp_bias",
    "attn_dropout": "attention_dropout",
}  # fmt: skip
# What config.json may leave out, with the defaults of transformers' LlamaConfig. n_kv_heads 0 means n_heads, head_dim likewise.
DEFAULTS = dict(n_kv_heads=0, head_dim=0, seq_len=2048, norm_eps=1e-6, tie_embeddings=False, attn_dropout=0.0)
DEFAULTS |= dict(attention_bias=False, mlp_bias=False)
# The only values that model.py supports.
SUPPORTED = {"hidden_act": "silu", "quantization_config": None, "sliding_window": None, "partial_rotary_factor": 1.0}
# The parameters of each rope_type, beside rope_theta.
LLAMA3 = {
    "rope_factor": "factor", "rope_low_freq_factor": "low_freq_factor", "rope_high_freq_factor": "high_freq_factor",
    "rope_original_seq_len": "original_max_position_embeddings",
}  # fmt: skip
ROPE = {"default": {}, "linear": {"rope_factor": "factor"}, "llama3": LLAMA3}
EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"  # one matrix if the embeddings are tied
OUR_TOKENIZER = "copyllama_tokenizer"  # in config.json: the state of data.tokenizer without its file


def load(path) -> dict:
    """Loads a Llama from a checkpoint, a run directory or a Hugging Face folder; returns what runtime.checkpoint.load does."""
    return read(path) if is_folder(Path(path)) else checkpoint.load(path)


def is_folder(path: Path) -> bool:
    """Returns whether `path` is a transformers folder and not a run directory, which has a config.json too."""
    if not (path / "config.json").is_file() or (path / "ckpt.pt").exists():
        return False
    return any(path.glob("*.safetensors*")) or b'"model_type"' in (path / "config.json").read_bytes()


def read(folder) -> dict:
    """Reads a folder's Llama; returns the entries of a checkpoint.

    `model` has our names and the dtypes of the files, `config` has the fields of ModelConfig, `step` is 0, and `tokenizer` is
    that of the checkpoint that was exported here, of tokenizer.model or of tokenizer.json; its kind is ids if there is none.
    Raises UserError if something is damaged or missing, or if model.py does not support the model.
    """
    folder = Path(folder)
    values = _json(folder / "config.json")
    with about(folder / "config.json"):
        config = from_dict(_fields(values), ModelConfig)
    tokenizer = _tokenizer(folder, values, config)
    return {"model": _tensors(folder, config), "config": dataclasses.asdict(config), "step": 0, "tokenizer": tokenizer}


def write(folder, state: dict, tokenizer) -> bool:
    """Writes a checkpoint's model and its tokenizer (a data.tokenizer.Tokenizer) as a folder that transformers loads.

    The folder is written under a temporary name and renamed. Returns whether it has a tokenizer.json, with our ids. Raises
    UserError if the folder exists and is not empty, or if the weights do not fit the config.
    """
    folder = Path(folder).absolute()
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise UserError(f"{folder}: already exists and is not empty; pass a new or empty folder")
    config = from_checkpoint(state["config"])
    weights = _their_weights(state["model"], config)
    tokenizer_files = hf_tokenizer.files(tokenizer)
    aside = folder.with_name(f"{folder.name}.{os.getpid()}.tmp")
    try:
        aside.mkdir(parents=True)
        safetensors = require("safetensors", "a Hugging Face folder", "hf")
        try:
            require("safetensors.torch", "a Hugging Face folder", "hf").save_file(weights, aside / WEIGHTS, {"format": "pt"})
        except safetensors.SafetensorError as e:  # as on a full disk
            raise RunFailed(f"{folder}: {first_line(e)}; make room, then run the same command again") from None
        (aside / "config.json").write_text(json.dumps(_config_json(config, tokenizer), indent=2) + "\n")
        shutil.copymode(aside / "config.json", aside / WEIGHTS)  # safetensors lets only its owner read it
        for name, text in (tokenizer_files or {}).items():
            (aside / name).write_text(text, encoding="utf-8")
        if tokenizer.file:
            (aside / tokenizer.file).write_bytes(tokenizer.model)
        with contextlib.suppress(FileNotFoundError):
            folder.rmdir()
        aside.rename(folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return tokenizer_files is not None


def _their_weights(model: dict, config: ModelConfig) -> dict[str, torch.Tensor]:
    weights = {}
    for ours, theirs in tensor_names(config).items():
        if ours not in model or model[ours].shape != (sum(s[0] for s in theirs.values()), *next(iter(theirs.values()))[1:]):
            raise UserError(f"{ours}: missing, or its shape is not that of the checkpoint's config")
        parts = model[ours].float().split([shape[0] for shape in theirs.values()])
        weights |= {name: part.clone() for name, part in zip(theirs, parts, strict=True)}
    return weights


def tensor_names(c: ModelConfig) -> dict[str, dict[str, tuple]]:
    """Returns for each of our tensors the names and shapes of theirs whose rows, concatenated, make it up."""
    q, kv, d, f = c.n_heads * c.head_dim, c.n_kv_heads * c.head_dim, c.dim, c.hidden_dim
    qkv = {"self_attn.q_proj": q, "self_attn.k_proj": kv, "self_attn.v_proj": kv}
    projections = {  # ours: ({theirs: rows}, columns, whether there is a bias)
        "attention.wqkv": (qkv, d, c.attention_bias),
        "attention.wo": ({"self_attn.o_proj": d}, q, c.attention_bias),
        "mlp.gate_up": ({"mlp.gate_proj": f, "mlp.up_proj": f}, d, c.mlp_bias),
        "mlp.down": ({"mlp.down_proj": d}, f, c.mlp_bias),
    }
    layer = {"attention_norm": {"input_layernorm.weight": (d,)}, "mlp_norm": {"post_attention_layernorm.weight": (d,)}}
    for ours, (theirs, columns, bias) in projections.items():
        layer[f"{ours}.weight"] = {f"{name}.weight": (rows, columns) for name, rows in theirs.items()}
        if bias:
            layer[f"{ours}.bias"] = {f"{name}.bias": (rows,) for name, rows in theirs.items()}
    names = {"embed.weight": {EMBED: (c.vocab_size, d)}, "norm": {"model.norm.weight": (d,)}}
    for i in range(c.n_layers):
        for ours, theirs in layer.items():
            names[f"blocks.{i}.{ours}"] = {f"model.layers.{i}.{name}": shape for name, shape in theirs.items()}
    return names if c.tie_embeddings else names | {"lm_head.weight": {HEAD: (c.vocab_size, d)}}


def _json(path: Path) -> dict:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (OSError, ValueError, RecursionError) as e:
        raise UserError(f"{path}: cannot be read ({type(e).__name__})") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: not a JSON object")
    return values


def _fields(values: dict) -> dict:
    """Returns the settings in config.json. Raises UserError for a model that model.py does not support."""
    if values.get("model_type") != "llama":
        raise UserError(f"model_type={values.get('model_type')}: expected llama; other models are not supported")
    if values.get("architectures") not in (None, ["LlamaForCausalLM"]):
        raise UserError(f"architectures={values['architectures']}: expected LlamaForCausalLM")
    for name, value in SUPPORTED.items():
        if values.get(name) not in (None, value):
            raise UserError(f"{name}={json.dumps(values[name])}: expected {json.dumps(value)}; other values are not supported")
    found = DEFAULTS | {ours: values[theirs] for ours, theirs in FIELDS.items() if values.get(theirs) is not None}
    if lacking := [theirs for ours, theirs in FIELDS.items() if ours not in found]:
        raise UserError(f"missing {', '.join(lacking)}")
    return found | _rope(values, found["seq_len"])


def _rope(values: dict, seq_len: int) -> dict:
    """Returns the settings of the rotary embedding, from rope_scaling or, since transformers 5, rope_parameters."""
    rope = values.get("rope_scaling") or values.get("rope_parameters") or {}
    expected = "rope_type must be default, linear or llama3, with all its parameters"
    refused = UserError(f"unsupported RoPE scaling {json.dumps(rope)}: {expected}")
    known = {"rope_type", "type", "rope_theta", "partial_rotary_factor", *LLAMA3.values()}
    if not isinstance(rope, dict) or rope.keys() - known or rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise refused
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in list(ROPE):
        raise refused
    given = {"original_max_position_embeddings": seq_len} | rope
    found = {ours: given.get(theirs) for ours, theirs in ROPE[kind].items()}
    if None in found.values():
        raise refused
    return found | {"rope_theta": rope.get("rope_theta") or values.get("rope_theta") or 10000.0}


def _config_json(c: ModelConfig, tokenizer) -> dict:
    plain = {name: value for name, value in tokenizer.values().items() if not isinstance(value, bytes)}
    fixed = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "float32", "hidden_act": "silu"}
    kind = "llama3" if c.rope_original_seq_len else "default" if c.rope_factor == 1 else "linear"
    rope = {"rope_type": kind} | {theirs: getattr(c, ours) for ours, theirs in ROPE[kind].items()}
    # transformers 4 reads rope_theta and rope_scaling, transformers 5 rope_parameters.
    fixed |= {"rope_theta": c.rope_theta, "rope_parameters": rope | {"rope_theta": c.rope_theta}}
    fixed |= {} if kind == "default" else {"rope_scaling": rope}
    shape = {theirs: getattr(c, ours) for ours, theirs in FIELDS.items()}
    return fixed | shape | {"bos_token_id": tokenizer.bos, "eos_token_id": tokenizer.eos, OUR_TOKENIZER: plain}


def _tokenizer(folder: Path, values: dict, config: ModelConfig) -> dict:
    """Returns the tokenizer's state: the exported checkpoint's, else that of tokenizer.model or tokenizer.json, else ids."""
    with about(folder / "config.json"):
        theirs = {"kind": "tokenizers"} | TokenizerJson.named_in(values)
    ours = values.get(OUR_TOKENIZER)
    for state in [{"kind": "sentencepiece"}, theirs] if ours is None else [ours]:
        if not isinstance(state, dict) or not isinstance(state.get("kind"), str):
            raise UserError(f"{folder / 'config.json'}: {OUR_TOKENIZER}={json.dumps(state)} names no tokenizer")
        file = getattr(KINDS.get(state["kind"]), "file", None)
        if file is None:
            return state
        if (folder / file).is_file():
            model = (folder / file).read_bytes()
            if ours is None and file == "tokenizer.model" and (folder / "tokenizer.json").is_file():
                try:
                    SentencePiece(model)
                except UserError:  # as Llama 3's own tokenizer.model, which holds the ranks of tiktoken
                    continue
            return state | {"model": model}
    return {"kind": "ids", "size": config.vocab_size}


def _tensors(folder: Path, config: ModelConfig) -> dict[str, torch.Tensor]:
    """Reads the weights under our names, after all names, shapes and dtypes have been checked.

    The tensors of a file are mapped, not read; only those that are part of a larger one here are copied.
    """
    safetensors = require("safetensors", "a Hugging Face folder", "hf")
    wanted = tensor_names(config)
    with contextlib.ExitStack() as stack:
        found = {}  # their name -> (file, handle)
        for path in _shards(folder):
            try:
                handle = stack.enter_context(safetensors.safe_open(path, framework="pt"))
            except FileNotFoundError:
                raise UserError(f"{path}: no such file; the folder's index names it") from None
            except (safetensors.SafetensorError, OSError) as e:
                raise UserError(f"{path}: damaged, or not safetensors ({first_line(e)})") from None
            found |= {name: (path, handle) for name in handle.keys()}
        if config.tie_embeddings and HEAD in found and EMBED not in found:
            wanted["embed.weight"] = {HEAD: wanted["embed.weight"][EMBED]}
        shapes = {name: shape for theirs in wanted.values() for name, shape in theirs.items()}
        for name, shape in shapes.items():
            if name not in found:
                raise UserError(f"{folder}: tensor {name} is missing")
            path, stored = found[name][0], found[name][1].get_slice(name)
            if tuple(stored.get_shape()) != shape:
                raise UserError(f"{path}: {name} has shape {tuple(stored.get_shape())}, expected {shape} from config.json")
            if stored.get_dtype() not in ("F64", "F32", "F16", "BF16"):
                raise UserError(f"{path}: {name} is stored as {stored.get_dtype()}; expected F32, F16 or BF16")
        if config.tie_embeddings and HEAD in found and EMBED in found:
            head, embed = (found[name][1].get_tensor(name) for name in (HEAD, EMBED))
            if head.dtype != embed.dtype or not torch.equal(head, embed):
                differs = "lm_head.weight differs from embed_tokens.weight; set tie_word_embeddings to false"
                raise UserError(f"{folder / 'config.json'}: tie_word_embeddings is true, but {differs}")
        # Derived, and so not read: the rotary tables of old folders, and a tied lm_head.
        derived = {name for name in found if name.endswith(".rotary_emb.inv_freq")}
        derived |= {HEAD} if config.tie_embeddings else set()
        if unknown := sorted(found.keys() - shapes.keys() - derived):
            raise UserError(f"{found[unknown[0]][0]}: unexpected tensor {unknown[0]}: config.json describes no such parameter")
        ours = {}
        for name, theirs in wanted.items():
            parts = [found[part][1].get_tensor(part) for part in theirs]
            ours[name] = torch.cat(parts) if len(parts) > 1 else parts[0]
    return ours | ({"lm_head.weight": ours["embed.weight"]} if config.tie_embeddings else {})


def _shards(folder: Path) -> list[Path]:
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    if not (folder / INDEX).is_file():
        raise UserError(f"{folder}: has neither {WEIGHTS} nor {INDEX}; other formats are not supported")
    files = _json(folder / INDEX).get("weight_map")
    files = set(files.values()) if isinstance(files, dict) and all(isinstance(f, str) for f in files.values()) else set()
    if not files or any(Path(file).name != file for file in files):
        raise UserError(f"{folder / INDEX}: its weight_map does not name files of this folder")
    return [folder / file for file in sorted(files)]

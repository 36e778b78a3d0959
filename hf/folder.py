"""Llama folders as Hugging Face's transformers writes and reads them: config.json and safetensors, of one file or of shards.

Both lay a head's channels out in halves for the rotary turn (kernels.eager.rotary), so weights go over as they are; q, k and
v are one matrix here and three there, as are gate and up.
"""

import contextlib
import dataclasses
import json
import os
import shutil
from pathlib import Path

import torch

from config import ModelConfig, from_dict
from errors import UserError
from hf import tokenizer as hf_tokenizer
from runtime import checkpoint

INDEX, WEIGHTS = "model.safetensors.index.json", "model.safetensors"
FIELDS = {
    "dim": "hidden_size", "n_layers": "num_hidden_layers", "n_heads": "num_attention_heads",
    "n_kv_heads": "num_key_value_heads", "hidden_dim": "intermediate_size", "vocab_size": "vocab_size",
    "seq_len": "max_position_embeddings", "rope_theta": "rope_theta", "norm_eps": "rms_norm_eps",
    "tie_embeddings": "tie_word_embeddings", "attn_dropout": "attention_dropout",
}  # fmt: skip
# What config.json may leave out, as transformers' LlamaConfig has it; where it leaves n_kv_heads out, they are n_heads.
DEFAULTS = dict(n_kv_heads=0, seq_len=2048, rope_theta=10000.0, norm_eps=1e-6, tie_embeddings=False, attn_dropout=0.0)
# What this model computes, of what config.json may ask for.
COMPUTED = {"attention_bias": False, "mlp_bias": False, "hidden_act": "silu", "quantization_config": None}
ROPE = {"rope_type": "default", "type": "default", "partial_rotary_factor": 1.0}
OUR_TOKENIZER = "copyllama_tokenizer"  # in config.json: the plain values of data.tokenizer's state, without the file
TOKENIZER_FILES = {"sentencepiece": "tokenizer.model", "tiktoken": "tokenizer.tiktoken"}


def load(path) -> dict:
    """Any Llama, as runtime.checkpoint.load returns it: a checkpoint, a run directory or a Hugging Face folder."""
    return read(path) if is_folder(Path(path)) else checkpoint.load(path)


def is_folder(path: Path) -> bool:
    """Whether it is a folder of transformers' and not a run directory, which has a config.json too."""
    if not (path / "config.json").is_file() or (path / "ckpt.pt").exists():
        return False
    return any(path.glob("*.safetensors*")) or b'"model_type"' in (path / "config.json").read_bytes()


def read(folder) -> dict:
    """A folder's Llama with the entries of a checkpoint: `model` in fp32 under our names, `config` (the fields of
    ModelConfig), `step` 0, and `tokenizer`: that of tokenizer.model, or that of the checkpoint that was written here; of kind
    ids where there is neither. Raises UserError of one line for what is damaged, missing, or no Llama of model.py.
    """
    folder = Path(folder)
    values = _json(folder / "config.json")
    try:
        config = from_dict(_fields(values)).model()
    except UserError as e:
        raise UserError(f"{folder / 'config.json'}: {e}") from None
    model = _tensors(folder, config)
    return {"model": model, "config": dataclasses.asdict(config), "step": 0, "tokenizer": _tokenizer(folder, values, config)}


def write(folder, state: dict, tokenizer) -> bool:
    """Writes a checkpoint's model and its tokenizer (a data.tokenizer.Tokenizer) as a folder that transformers loads.

    Written aside and renamed. -> whether AutoTokenizer reads the vocabulary; its ids are ours where it does. Raises
    UserError where the folder is there and not empty, and where the weights do not fit the config.
    """
    folder = Path(folder).absolute()
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise UserError(f"{folder}: is there already; name a new or an empty folder")
    config = ModelConfig(**{f.name: state["config"][f.name] for f in dataclasses.fields(ModelConfig)})
    weights = {}
    for ours, theirs in tensor_names(config).items():
        whole, rows = state["model"].get(ours), [shape[0] for shape in theirs.values()]
        if whole is None or whole.shape != (sum(rows), *next(iter(theirs.values()))[1:]):
            raise UserError(f"{ours}: missing, or of another shape than the checkpoint's own config has")
        weights |= {name: part.float().clone() for name, part in zip(theirs, whole.split(rows), strict=True)}
    tokenizer_files = hf_tokenizer.files(tokenizer)
    aside = folder.with_name(f"{folder.name}.{os.getpid()}.tmp")
    try:
        aside.mkdir(parents=True)
        _safetensors().torch.save_file(weights, aside / WEIGHTS, metadata={"format": "pt"})
        (aside / "config.json").write_text(json.dumps(_config_json(config, tokenizer), indent=2) + "\n")
        for name, text in (tokenizer_files or {}).items():
            (aside / name).write_text(text, encoding="utf-8")
        if tokenizer.kind in TOKENIZER_FILES:
            (aside / TOKENIZER_FILES[tokenizer.kind]).write_bytes(tokenizer.model)
        with contextlib.suppress(FileNotFoundError):
            folder.rmdir()
        aside.rename(folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return tokenizer_files is not None


def tensor_names(c: ModelConfig) -> dict[str, dict[str, tuple]]:
    """Our name of each tensor -> the names and shapes of theirs that, one below the other, are ours."""
    d, kv = c.dim, c.n_kv_heads * c.head_dim
    names = {"embed.weight": {"model.embed_tokens.weight": (c.vocab_size, d)}}
    for i in range(c.n_layers):
        qkv = {f"self_attn.{n}_proj.weight": (rows, d) for n, rows in zip("qkv", (d, kv, kv), strict=True)}
        layer = {
            "attention_norm": {"input_layernorm.weight": (d,)},
            "attention.wqkv.weight": qkv,
            "attention.wo.weight": {"self_attn.o_proj.weight": (d, d)},
            "mlp_norm": {"post_attention_layernorm.weight": (d,)},
            "mlp.gate_up.weight": {"mlp.gate_proj.weight": (c.hidden_dim, d), "mlp.up_proj.weight": (c.hidden_dim, d)},
            "mlp.down.weight": {"mlp.down_proj.weight": (d, c.hidden_dim)},
        }
        for ours, theirs in layer.items():
            names[f"blocks.{i}.{ours}"] = {f"model.layers.{i}.{name}": shape for name, shape in theirs.items()}
    names["norm"] = {"model.norm.weight": (d,)}
    return names if c.tie_embeddings else names | {"lm_head.weight": {"lm_head.weight": (c.vocab_size, d)}}


def _json(path: Path) -> dict:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (OSError, ValueError) as e:
        raise UserError(f"{path}: cannot be read ({type(e).__name__})") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: not a JSON object")
    return values


def _fields(values: dict) -> dict:
    """The settings that config.json states. Raises UserError for a model that model.py does not compute."""
    if values.get("model_type") != "llama":
        raise UserError(f"model_type={values.get('model_type')}: expected llama; no other is read")
    if values.get("architectures") not in (None, ["LlamaForCausalLM"]):
        raise UserError(f"architectures={values['architectures']}: expected LlamaForCausalLM")
    ropes = [values[name] for name in ("rope_scaling", "rope_parameters") if values.get(name) is not None]
    for rope in ropes:
        if (
            not isinstance(rope, dict)
            or any(ROPE.get(k, v) != v for k, v in rope.items())
            or rope.keys() - ROPE - {"rope_theta"}
        ):
            raise UserError(f"rotary positions {json.dumps(rope)}: only the unscaled kind, rope_type default, is computed")
        values = values | {name: value for name, value in rope.items() if name == "rope_theta"}
    for name, value in COMPUTED.items():
        if values.get(name, value) != value:
            raise UserError(f"{name}={json.dumps(values[name])}: expected {json.dumps(value)}; nothing else is computed")
    found = {ours: values[theirs] for ours, theirs in FIELDS.items() if values.get(theirs) is not None}
    if lacking := [theirs for ours, theirs in FIELDS.items() if ours not in found | DEFAULTS]:
        raise UserError(f"it has no {', '.join(lacking)}")
    config = from_dict(DEFAULTS | found)
    if values.get("head_dim", config.head_dim) not in (None, config.head_dim):
        raise UserError(f"head_dim={values['head_dim']}: expected hidden_size / num_attention_heads, {config.head_dim}")
    return DEFAULTS | found


def _config_json(c: ModelConfig, tokenizer) -> dict:
    plain = {name: value for name, value in tokenizer.state().items() if not isinstance(value, bytes)}
    fixed = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "float32", "head_dim": c.head_dim}
    fixed |= {name: value for name, value in COMPUTED.items() if value is not None}
    # transformers 4 reads rope_theta, transformers 5 rope_parameters.
    fixed["rope_parameters"] = {"rope_type": "default", "rope_theta": c.rope_theta}
    shape = {theirs: getattr(c, ours) for ours, theirs in FIELDS.items()}
    return fixed | shape | {"bos_token_id": tokenizer.bos, "eos_token_id": tokenizer.eos, OUR_TOKENIZER: plain}


def _tokenizer(folder: Path, values: dict, config: ModelConfig) -> dict:
    state = values.get(OUR_TOKENIZER, {"kind": "sentencepiece"})
    if not isinstance(state, dict) or not isinstance(state.get("kind"), str):
        raise UserError(f"{folder / 'config.json'}: {OUR_TOKENIZER}={json.dumps(state)} names no tokenizer")
    file = TOKENIZER_FILES.get(state["kind"])
    if file is None:
        return state
    if (folder / file).is_file():
        return state | {"model": (folder / file).read_bytes()}
    return {"kind": "ids", "size": config.vocab_size}  # what nobody left here, as transformers where it saves a model alone


def _tensors(folder: Path, config: ModelConfig) -> dict[str, torch.Tensor]:
    """The weights in fp32 under our names; all names, shapes and kinds of number are looked at before one is read."""
    safetensors = _safetensors()
    with contextlib.ExitStack() as stack:
        found = {}  # their name -> (file, handle)
        for path in _shards(folder):
            try:
                handle = stack.enter_context(safetensors.safe_open(path, framework="pt"))
            except FileNotFoundError:
                raise UserError(f"{path}: no such file; the folder's index names it") from None
            except (safetensors.SafetensorError, OSError) as e:
                raise UserError(f"{path}: damaged, or not safetensors ({str(e).splitlines()[0]})") from None
            found |= {name: (path, handle) for name in handle.keys()}
        wanted = tensor_names(config)
        shapes = {name: shape for theirs in wanted.values() for name, shape in theirs.items()}
        for name, shape in shapes.items():
            if name not in found:
                raise UserError(f"{folder}: has no tensor {name}")
            path, handle = found[name]
            stored = handle.get_slice(name)
            if tuple(stored.get_shape()) != shape:
                raise UserError(f"{path}: {name} has shape {tuple(stored.get_shape())}, but config.json makes it {shape}")
            if stored.get_dtype() not in ("F64", "F32", "F16", "BF16"):
                raise UserError(f"{path}: {name} is stored as {stored.get_dtype()}; expected F32, F16 or BF16")
        # Derived, and so not read: rotary tables in old folders, and a tied head.
        derived = {"lm_head.weight"} if config.tie_embeddings else set()
        for name in sorted(found.keys() - shapes.keys() - derived):
            if not name.endswith(".rotary_emb.inv_freq"):
                raise UserError(f"{found[name][0]}: tensor {name} has no place in this Llama")
        ours = {}
        for name, theirs in wanted.items():
            ours[name] = torch.cat([found[n][1].get_tensor(n).float() for n in theirs])
    return ours | ({"lm_head.weight": ours["embed.weight"]} if config.tie_embeddings else {})


def _shards(folder: Path) -> list[Path]:
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    if not (folder / INDEX).is_file():
        raise UserError(f"{folder}: has neither {WEIGHTS} nor {INDEX}; other formats are not read")
    files = _json(folder / INDEX).get("weight_map")
    files = set(files.values()) if isinstance(files, dict) and all(isinstance(f, str) for f in files.values()) else set()
    if not files or any(Path(file).name != file for file in files):
        raise UserError(f"{folder / INDEX}: its weight_map does not name files of this folder")
    return [folder / file for file in sorted(files)]


def _safetensors():
    """The package, which only Hugging Face folders need."""
    try:
        import safetensors
        import safetensors.torch
    except ModuleNotFoundError:
        raise UserError("safetensors is not installed, and Hugging Face folders need it: pip install safetensors") from None
    return safetensors

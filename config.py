"""Every setting of a run, once: its name, type, default and unit.

A config is a Python file that assigns these names; `--name=value` or `--name value` on the command line overrides it.
Nothing heavy is imported here, so `python train.py --help` and every message about a wrong setting are instant.
"""

import argparse
import contextlib
import dataclasses
import difflib
import math
import os
import runpy
import sys
import traceback
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from cli import Parser, run_command, whole
from errors import UserError

ROOT = Path(__file__).resolve().parent
PATHS = ("data", "out_dir", "init_from")
# The settings that may differ between a checkpoint and the run that resumes it. None of them changes an update already made.
MAY_CHANGE = {
    "data", "out_dir", "prepare", "max_steps", "eval_interval", "eval_batches", "copy_eval_interval", "log_interval",
    "log_to", "ckpt_interval", "ckpt_keep", "ckpt_milestones", "milestone_interval", "resume", "allow_changes", "device",
    "compile", "kernels", "micro_batch_size",
    "init_from",  # only a new run reads it; runtime.resume refuses another source than the one that the run started from
}  # fmt: skip
# Settings that may also differ with --allow_changes=true: they affect later updates, but not which data those updates see.
MAY_CHANGE_ON_REQUEST = {
    "learning_rate", "min_lr", "warmup_steps", "schedule", "weight_decay", "beta1", "beta2", "grad_clip", "attn_dropout",
}  # fmt: skip
# Settings that did not exist when older checkpoints were written; those runs behaved as the defaults do.
ADDED = {
    "head_dim", "rope_factor", "rope_original_seq_len", "rope_low_freq_factor", "rope_high_freq_factor", "attention_bias",
    "mlp_bias", "repeated_weight",
}  # fmt: skip


def setting(default, doc: str, least=None):
    return field(default=default, metadata={"doc": doc, "least": least})


@dataclass(frozen=True)
class ModelConfig:
    """The shape of a Llama. The defaults are llama162m: 162,417,408 parameters."""

    dim: int = setting(768, "width of the residual stream (D)", least=1)
    n_layers: int = setting(12, "number of transformer blocks", least=1)
    n_heads: int = setting(12, "query heads per block (H)", least=1)
    n_kv_heads: int = setting(0, "key and value heads per block (Hkv); 0: as many as n_heads", least=1)
    head_dim: int = setting(0, "channels per head (Dh); 0: dim / n_heads", least=1)
    hidden_dim: int = setting(3072, "width of the feed-forward layer (F)", least=1)
    vocab_size: int = setting(32000, "number of token ids (V); bins hold at most 65536", least=1)
    seq_len: int = setting(1024, "context length in tokens (T)", least=1)
    rope_theta: float = setting(10000.0, "base of the rotary frequencies")
    rope_factor: float = setting(1.0, "RoPE scaling factor: linear, or Llama 3.1's if rope_original_seq_len is set")
    rope_original_seq_len: int = setting(0, "original context of Llama 3.1's scaling; 0: linear scaling", least=0)
    rope_low_freq_factor: float = setting(
        1.0, "Llama 3.1: frequencies with fewer rotations than this in the original context are divided"
    )
    rope_high_freq_factor: float = setting(
        4.0, "Llama 3.1: frequencies with more rotations than this in the original context are kept"
    )
    norm_eps: float = setting(1e-6, "epsilon inside RMSNorm")
    tie_embeddings: bool = setting(False, "use the embedding matrix as the output head too")
    attention_bias: bool = setting(False, "biases in the projections of attention")
    mlp_bias: bool = setting(False, "biases in the projections of the feed-forward layer")
    attn_dropout: float = setting(
        0.0, "fraction of attention probabilities dropped in training, rounded to a multiple of 1/256"
    )

    def __post_init__(self):
        if self.n_kv_heads == 0:
            object.__setattr__(self, "n_kv_heads", self.n_heads)
        if self.head_dim == 0 and self.n_heads > 0:
            object.__setattr__(self, "head_dim", self.dim // self.n_heads)
        for f in dataclasses.fields(self):
            value, least = getattr(self, f.name), f.metadata["least"]
            _check(self, f.name, not isinstance(value, float) or math.isfinite(value), "must be a finite number")
            _check(self, f.name, least is None or value >= least, f"must be at least {least}")
        _check(self, "dim", self.dim % self.n_heads == 0, f"must be a multiple of n_heads={self.n_heads}")
        shape = f"(dim={self.dim}, n_heads={self.n_heads})"
        _check(self, "head_dim", self.head_dim % 2 == 0, f"must be even, as rotary embeddings rotate pairs of channels {shape}")
        _check(self, "n_heads", self.n_heads % self.n_kv_heads == 0, f"must be a multiple of n_kv_heads={self.n_kv_heads}")
        for name in ("rope_theta", "rope_factor", "rope_low_freq_factor", "norm_eps"):
            _check(self, name, getattr(self, name) > 0, "must be above 0")
        low, high = self.rope_low_freq_factor, self.rope_high_freq_factor
        _check(self, "rope_low_freq_factor", low < high, f"must be below rope_high_freq_factor={high}")
        _check(self, "attn_dropout", 0 <= self.attn_dropout <= 255 / 256, "must lie in 0..255/256")

    @property
    def n_parameters(self) -> int:
        qkv, attention = (self.n_heads + 2 * self.n_kv_heads) * self.head_dim, self.n_heads * self.head_dim
        block = self.dim * (qkv + attention + 3 * self.hidden_dim + 2)
        block += self.attention_bias * (qkv + self.dim) + self.mlp_bias * (2 * self.hidden_dim + self.dim)
        return self.n_layers * block + self.dim + self.vocab_size * self.dim * (1 if self.tie_embeddings else 2)


@dataclass(frozen=True)
class Config(ModelConfig):
    """A whole run: the model's shape, its data, the optimizer, and how often to evaluate and save."""

    data: str = setting("data/redpajama", "folder with train.bin and val.bin")
    prepare: str = setting("", "arguments of `python -m data.prepare` that make this data")
    out_dir: str = setting("", "run directory; empty: runs/<config name>")
    seed: int = setting(0, "seed of the weights, the data order and dropout", least=0)

    batch_size: int = setting(512, "sequences per update, over all ranks and gradient accumulation steps", least=1)
    micro_batch_size: int = setting(64, "maximum sequences per device in one gradient accumulation step", least=1)
    max_steps: int = setting(76294, "number of updates", least=0)
    optimizer: Literal["adamw", "muon"] = setting("adamw", "muon: Muon for the blocks' matrices, AdamW for all else")
    learning_rate: float = setting(4e-4, "peak learning rate")
    min_lr: float = setting(0.0, "learning rate at the end of a cosine or wsd schedule")
    warmup_steps: int = setting(2000, "updates of linear warm-up", least=0)
    schedule: Literal["constant", "cosine", "wsd"] = setting(
        "constant", "after warm-up; wsd: constant, then linear decay over the last fifth of the run"
    )
    weight_decay: float = setting(0.0, "decoupled weight decay, on matrices only", least=0)
    beta1: float = setting(0.9, "AdamW's decay of the first moment")
    beta2: float = setting(0.999, "AdamW's decay of the second moment")
    grad_clip: float = setting(1.0, "largest gradient norm; 0: no clipping", least=0)

    repeated_weight: float = setting(
        1.0,
        "loss weight, relative to all others, of targets that already followed the current token earlier in the window",
        least=0,
    )

    eval_interval: int = setting(1000, "updates between validations, of which one is at the end; 0: never", least=0)
    eval_batches: int = setting(4, "validation batches, of batch_size sequences each", least=1)
    copy_eval_interval: int = setting(1000, "updates between copy tests, of which one is at the end; 0: never", least=0)
    log_interval: int = setting(10, "updates between log lines", least=1)
    log_to: Literal["none", "tensorboard", "wandb"] = setting("none", "log to TensorBoard or Weights & Biases too")
    ckpt_interval: int = setting(1000, "updates between checkpoints", least=1)
    ckpt_keep: int = setting(
        2, "number of recent checkpoints to keep; if the newest is damaged, resume uses the one before", least=1
    )
    ckpt_milestones: bool = setting(False, "keep the weights of steps 1, 2, 4 ... 512, and of each milestone_interval")
    milestone_interval: int = setting(1000, "updates between milestones", least=1)
    resume: str = setting("auto", "auto: from the run directory's newest checkpoint; none: start anew; or a checkpoint file")
    allow_changes: bool = setting(
        False, "let a resumed run change the learning rate and its schedule, weight decay, betas, clipping and dropout"
    )
    init_from: str = setting("", "weights of a new run: a checkpoint, a run directory or a Hugging Face Llama folder")

    device: str = setting("auto", "auto, cuda, cuda:N, mps or cpu")
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = setting(
        "auto", "dtype of activations; auto: bf16 on GPUs that have it, fp16 on older ones, fp32 elsewhere"
    )
    compile: Literal["auto", "on", "off"] = setting("auto", "torch.compile block by block; auto: on CUDA and CPUs, if it works")
    kernels: Literal["auto", "fused", "sdpa", "eager"] = setting(
        "auto", "op set: Triton, PyTorch's own kernels or the definitions; auto: fused on NVIDIA GPUs in 16 bits, else sdpa"
    )

    def __post_init__(self):
        super().__post_init__()
        _check(self, "vocab_size", self.vocab_size <= 65536, "must fit uint16 tokens: at most 65536")
        _check(self, "learning_rate", self.learning_rate > 0, "must be above 0")
        _check(self, "min_lr", 0 <= self.min_lr <= self.learning_rate, f"must lie in 0..learning_rate={self.learning_rate}")
        for name in ("beta1", "beta2"):
            _check(self, name, 0 <= getattr(self, name) < 1, "must be at least 0 and below 1")

    def model(self) -> ModelConfig:
        return ModelConfig(**{name: getattr(self, name) for name in SHAPE})


SHAPE = {f.name for f in dataclasses.fields(ModelConfig)}
TYPES = typing.get_type_hints(Config)  # setting -> int, float, bool, str, or a Literal of its choices


def _check(config, name: str, ok: bool, rule: str):
    if not ok:
        raise UserError(f"{name}={getattr(config, name)}: {rule}")


def command_line() -> Parser:
    """Returns the parser of `[CONFIG.py] [--name=value ...]`, with one option per setting."""
    parser = Parser(
        prog="python train.py",
        usage="python train.py [CONFIG.py] [--name=value ...]",
        description="Trains a Llama. Without CONFIG.py it trains llama162m.",
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=32, width=120),
    )
    parser.add_argument("config", nargs="*", metavar="CONFIG.py", help="Python file that assigns settings")
    for f in dataclasses.fields(Config):
        choices = typing.get_args(TYPES[f.name])
        kind = "|".join(choices) if choices else TYPES[f.name].__name__
        default = str(f.default).lower() if TYPES[f.name] is bool else f.default
        shown = "" if default == "" else f" (default: {default})"
        parser.add_argument(f"--{f.name}", metavar=kind, help=f.metadata["doc"] + shown)
    return parser


def load(argv: list[str]) -> Config:
    """Returns the config of `[CONFIG.py] [--name=value ...]`; llama162m if no file is named.

    A relative path in a file is relative to the project's root, one on the command line to the current folder. --data replaces
    the file's `prepare` as well. Raises UserError for a name that is not a setting, a value of the wrong type, or a file that
    cannot be run.
    """
    given = {name: text for name, text in vars(command_line().parse_args(argv)).items() if text is not None}
    files = given.pop("config")
    if len(files) > 1:
        raise UserError(f"{' '.join(files)}: one config file at a time; settings are written --name=value")
    path = Path(files[0]) if files else ROOT / "configs/llama162m.py"
    values = read_file(path)
    values["out_dir"] = values.get("out_dir") or f"runs/{path.stem}"
    for name in PATHS:
        if isinstance(values.get(name), str) and values[name]:
            values[name] = os.path.relpath(ROOT / values[name])
    # An empty --out_dir= comes from an unset shell variable.
    given = {name: parse(name, text) for name, text in given.items() if (name, text) != ("out_dir", "")}
    if "data" in given:
        values.pop("prepare", None)  # it makes the data that the file names
    return from_dict(values | given)


def changed(then: dict, now: Config) -> dict[str, tuple]:
    """Returns the settings in which a checkpoint's config differs from `now`: name -> (value then, value now)."""
    then = {f.name: f.default for f in dataclasses.fields(now) if f.name in ADDED - SHAPE} | renamed(then)
    with contextlib.suppress(UserError):  # what is missing or of the wrong type differs anyway
        then = then | dataclasses.asdict(from_checkpoint({name: then[name] for name in SHAPE & then.keys()}))
    return {name: (then.get(name), value) for name, value in dataclasses.asdict(now).items() if then.get(name) != value}


def read_file(path: Path) -> dict:
    """Returns what a config file assigns, without imported modules and names that begin with an underscore."""
    if not path.is_file():
        available = ", ".join(sorted(str(p.relative_to(ROOT)) for p in (ROOT / "configs").glob("*.py")))
        raise UserError(f"{path}: no such config file; available: {available}")
    if path.suffix in (".json", ".pt", ".bin", ".jsonl"):
        raise UserError(f"{path}: a config is a Python file, such as configs/tiny.py; a run resumes by its own --out_dir")
    try:
        names = runpy.run_path(str(path))
    except (Exception, SystemExit) as e:
        frames = [e] if isinstance(e, SyntaxError) else reversed(traceback.extract_tb(e.__traceback__))
        line = next((f":{frame.lineno}" for frame in frames if frame.filename == str(path)), "")
        raise UserError(f"{path}{line}: {type(e).__name__}: {' '.join(str(e).split())}") from None
    return {k: v for k, v in names.items() if not k.startswith("_") and not isinstance(v, type(sys))}


def from_dict(values: dict, kind=Config):
    """Returns a checked `kind`. Raises UserError for an unknown name, with the nearest known one, and for a wrong type."""
    values = dict(values)
    for name, value in values.items():
        expected = _type(name)
        if type(value) is int and abs(value) >= 2**31:
            raise UserError(f"{name}: must be between -2^31 and 2^31")
        if expected is float and type(value) is int:
            values[name] = float(value)
        elif typing.get_origin(expected) is Literal:
            _one_of(name, value, typing.get_args(expected))
        elif type(value) is not expected:
            raise UserError(f"{name}={value!r}: expected {expected.__name__}, got {type(value).__name__}")
    return kind(**values)


def from_checkpoint(values: dict) -> ModelConfig:
    """Returns the shape of a checkpoint's model, from its config, which must name all of it, as defaults may differ."""
    for name in renamed(values):
        _type(name)  # raises for an unknown one, which may change what the model computes
    if missing := sorted(SHAPE - ADDED - values.keys()):
        raise UserError(f"{missing[0]}: missing from its settings")
    return from_dict({name: values[name] for name in SHAPE & values.keys()}, ModelConfig)


def renamed(values: dict) -> dict:
    """Returns the settings of a checkpoint by their present names. mask_repeated=True was repeated_weight=0."""
    values = dict(values)
    if "mask_repeated" in values:
        values["repeated_weight"] = 0.0 if values.pop("mask_repeated") else 1.0
    return values


def parse(name: str, text: str):
    """Returns the value that `text` stands for as setting `name`: 1e3 is an int too, booleans are true or false."""
    kind = _type(name)
    if kind is bool:
        return _one_of(name, text.lower(), ("true", "false")) == "true"
    for number in {int: (int, whole), float: (float,)}.get(kind, ()):
        with contextlib.suppress(ValueError):
            return number(text)
    if kind in (int, float):
        raise UserError(f"{name}={text}: expected {kind.__name__}")
    return text


def _type(name: str):
    if name not in TYPES:
        nearest = difflib.get_close_matches(name, TYPES, n=1)
        hint = f"did you mean {nearest[0]}?" if nearest else "python train.py --help lists all settings"
        raise UserError(f"{name}: no such setting; {hint}")
    return TYPES[name]


def _one_of(name: str, value, choices):
    if value not in choices:
        raise UserError(f"{name}={value}: expected one of {', '.join(choices)}")
    return value


def from_command_line(argv: list[str]) -> Config:
    """Returns load(argv). Ends the process after a mistake, with status 2 and one line, and after --help, with status 0."""
    loaded = []
    if status := run_command(lambda argv: loaded.append(load(argv)) or 0, argv):
        sys.exit(status)
    return loaded[0]

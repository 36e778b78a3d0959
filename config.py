"""Every setting of a run, once: its name, type, default and unit.

A config is a Python file that assigns these names; `--name=value` on the command line wins over the file.
Nothing heavy is imported here, so `python train.py --help` and every message about a bad setting are instant.
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

from errors import UserError

ROOT = Path(__file__).resolve().parent
PATHS = ("data", "out_dir", "init_from")
# What may differ between a checkpoint and the run that goes on from it: none of these changes a finished update.
MAY_CHANGE = {
    "data", "out_dir", "prepare", "max_steps", "eval_interval", "eval_batches", "copy_eval_interval", "log_interval",
    "ckpt_interval", "ckpt_keep", "ckpt_milestones", "milestone_interval", "resume", "device", "compile", "kernels",
    "micro_batch_size",
    "init_from",  # read by a new run alone; one that is named, and is not what the run began from, train.resume refuses
}  # fmt: skip


class Parser(argparse.ArgumentParser):
    """The parser of every command. A mistake on the command line raises UserError."""

    def __init__(self, **kwargs):
        super().__init__(allow_abbrev=False, **kwargs)

    def error(self, message):
        raise UserError(f"{message}; see {self.prog} --help")


def setting(default, doc: str):
    return field(default=default, metadata={"doc": doc})


@dataclass(frozen=True)
class ModelConfig:
    """The shape of a Llama. The defaults are llama162m: 162,417,408 parameters."""

    dim: int = setting(768, "width of the residual stream (D)")
    n_layers: int = setting(12, "transformer blocks")
    n_heads: int = setting(12, "query heads per block (H); the head dim is dim / n_heads")
    n_kv_heads: int = setting(0, "key and value heads per block (Hkv); 0: as many as n_heads")
    hidden_dim: int = setting(3072, "width of the feed-forward layer (F)")
    vocab_size: int = setting(32000, "token ids the model knows (V), at most 65536")
    seq_len: int = setting(1024, "context length in tokens (T)")
    rope_theta: float = setting(10000.0, "base of the rotary frequencies")
    norm_eps: float = setting(1e-6, "epsilon inside RMSNorm")
    tie_embeddings: bool = setting(False, "use the embedding matrix as the output head too")
    attn_dropout: float = setting(0.0, "share of attention probabilities dropped in training, in 1/256ths")

    def __post_init__(self):
        if self.n_kv_heads == 0:
            object.__setattr__(self, "n_kv_heads", self.n_heads)
        for name, value in vars(self).items():
            _check(self, name, not isinstance(value, float) or math.isfinite(value), "must be a finite number")
        for name in ("dim", "n_layers", "n_heads", "n_kv_heads", "hidden_dim", "vocab_size", "seq_len"):
            _check(self, name, getattr(self, name) >= 1, "must be at least 1")
        _check(self, "dim", self.dim % self.n_heads == 0, f"must be a multiple of n_heads={self.n_heads}")
        _check(self, "dim", self.head_dim % 2 == 0, "must give an even head dim: rotary turns pairs of channels")
        _check(self, "n_heads", self.n_heads % self.n_kv_heads == 0, f"must be a multiple of n_kv_heads={self.n_kv_heads}")
        _check(self, "vocab_size", self.vocab_size <= 65536, "must fit uint16 tokens: at most 65536")
        _check(self, "rope_theta", self.rope_theta > 0, "must be above 0")
        _check(self, "norm_eps", self.norm_eps > 0, "must be above 0")
        _check(self, "attn_dropout", 0 <= self.attn_dropout <= 255 / 256, "must lie in 0..255/256")

    @property
    def head_dim(self) -> int:
        return self.dim // self.n_heads


@dataclass(frozen=True)
class Config(ModelConfig):
    """A whole run: the model's shape, its data, the optimiser, and how often to measure and save."""

    data: str = setting("data/redpajama", "folder of train.bin and val.bin")
    prepare: str = setting("", "arguments of `python -m data.prepare` that make this data")
    out_dir: str = setting("", "run directory; empty: runs/<config name>")
    seed: int = setting(0, "seed of the weights, the data order and dropout")

    batch_size: int = setting(512, "sequences per update, over all ranks and accumulation steps")
    micro_batch_size: int = setting(64, "sequences per device and pass, at most")
    max_steps: int = setting(76294, "updates in all")
    optimizer: Literal["adamw"] = setting("adamw", "AdamW; decay on matrices only")
    learning_rate: float = setting(4e-4, "peak learning rate")
    min_lr: float = setting(0.0, "learning rate at the end of a cosine or wsd schedule")
    warmup_steps: int = setting(2000, "updates of linear warm-up")
    schedule: Literal["constant", "cosine", "wsd"] = setting(
        "constant", "after warm-up; wsd is warm-up, stable, then linear decay over the last fifth"
    )
    weight_decay: float = setting(0.0, "AdamW's decoupled decay")
    beta1: float = setting(0.9, "AdamW's decay of the first moment")
    beta2: float = setting(0.999, "AdamW's decay of the second moment")
    grad_clip: float = setting(1.0, "largest gradient norm; 0: no clipping")

    eval_interval: int = setting(1000, "updates between validations; 0: never")
    eval_batches: int = setting(4, "validation batches, of batch_size sequences each")
    copy_eval_interval: int = setting(1000, "updates between copy tests; 0: never")
    log_interval: int = setting(10, "updates between log lines")
    ckpt_interval: int = setting(1000, "updates between checkpoints")
    ckpt_keep: int = setting(2, "newest checkpoints to keep: the one before is there where the newest is damaged")
    ckpt_milestones: bool = setting(False, "keep the weights of steps 1, 2, 4 ... 512, and of each milestone_interval")
    milestone_interval: int = setting(1000, "updates between milestones")
    resume: str = setting("auto", "auto: from the run directory where it has a checkpoint; none: start anew; or a checkpoint")
    init_from: str = setting(
        "", "weights a new run starts from, at step 0: a checkpoint, a run directory or a Hugging Face Llama folder"
    )

    device: str = setting("auto", "auto, cuda, mps or cpu")
    dtype: Literal["auto", "fp32", "bf16"] = setting("auto", "of activations; auto: bf16 on CUDA, else fp32")
    compile: Literal["auto", "on", "off"] = setting("auto", "torch.compile block by block; auto: on CUDA and CPUs, if it works")
    kernels: Literal["auto", "fused", "sdpa", "eager"] = setting(
        "auto", "op set: Triton, PyTorch's fused kernels or the definitions; auto: fused where Triton fits, else sdpa"
    )

    def __post_init__(self):
        super().__post_init__()
        for name in (
            "batch_size",
            "micro_batch_size",
            "log_interval",
            "ckpt_interval",
            "milestone_interval",
            "ckpt_keep",
            "eval_batches",
        ):
            _check(self, name, getattr(self, name) >= 1, "must be at least 1")
        for name in ("seed", "max_steps", "warmup_steps", "eval_interval", "copy_eval_interval", "grad_clip", "weight_decay"):
            _check(self, name, getattr(self, name) >= 0, "must be at least 0")
        _check(self, "learning_rate", self.learning_rate > 0, "must be above 0")
        _check(self, "min_lr", 0 <= self.min_lr <= self.learning_rate, f"must lie in 0..learning_rate={self.learning_rate}")
        for name in ("beta1", "beta2"):
            _check(self, name, 0 <= getattr(self, name) < 1, "must be at least 0 and below 1")

    def model(self) -> ModelConfig:
        return ModelConfig(**{f.name: getattr(self, f.name) for f in dataclasses.fields(ModelConfig)})


def _check(config, name: str, ok: bool, rule: str):
    if not ok:
        raise UserError(f"{name}={getattr(config, name)}: {rule}")


def load(argv: list[str]) -> Config:
    """The config of `[CONFIG.py] [--name=value ...]`; llama162m where no file is named.

    A relative path in a file is taken from the project's root, one on the command line from the current folder.
    Raises UserError for a name that is not a setting, a value of the wrong type, or a file that cannot be run.
    """
    files = [a for a in argv if not a.startswith("-")]
    if len(files) > 1:
        raise UserError(f"{' '.join(files)}: one config file at a time; settings are written --name=value")
    path = Path(files[0]) if files else ROOT / "configs/llama162m.py"
    values = read_file(path)
    values["out_dir"] = values.get("out_dir") or f"runs/{path.stem}"
    paths = {name: values[name] for name in PATHS if isinstance(values.get(name), str) and values[name]}
    values |= {name: os.path.relpath(ROOT / path) for name, path in paths.items()}
    for arg in argv:
        if arg.startswith("-"):
            name, equals, text = arg.removeprefix("--").partition("=")
            if not equals:
                raise UserError(f"{arg}: settings are written --name=value")
            values[name] = parse(name, text)
    return from_dict(values)


def changed(then: dict, now: Config) -> list[str]:
    """The settings in which a checkpoint's config differs from the run that goes on from it, of those that may not."""
    return [
        f"{name} {then.get(name)} -> {value}"
        for name, value in dataclasses.asdict(now).items()
        if name not in MAY_CHANGE and then.get(name) != value
    ]


def read_file(path: Path) -> dict:
    """The names that a config file assigns. Names that begin with _ and imported modules are its own."""
    if not path.is_file():
        have = ", ".join(sorted(str(p.relative_to(ROOT)) for p in (ROOT / "configs").glob("*.py")))
        raise UserError(f"{path}: no such config file; here are {have}")
    try:
        names = runpy.run_path(str(path))
    except (Exception, SystemExit) as e:
        line = next((f":{t.lineno}" for t in reversed(_frames(e)) if t.filename == str(path)), "")
        raise UserError(f"{path}{line}: {type(e).__name__}: {e}") from None
    return {k: v for k, v in names.items() if not k.startswith("_") and not isinstance(v, type(sys))}


def _frames(e: BaseException) -> list:
    return [e] if isinstance(e, SyntaxError) else list(traceback.extract_tb(e.__traceback__))


def from_dict(values: dict) -> Config:
    """A checked Config. An unknown name is refused with the nearest known one, a wrong type by its name."""
    for name, value in values.items():
        kind = _kind(name)
        if type(value) is int and abs(value) >= 2**31:
            raise UserError(f"{name}: must be below 2^31")
        if kind is float and type(value) is int:
            values = values | {name: float(value)}
        elif typing.get_origin(kind) is Literal:
            _one_of(name, value, typing.get_args(kind))
        elif type(value) is not kind:
            raise UserError(f"{name}={value!r}: expected {kind.__name__}, got {type(value).__name__}")
    return Config(**values)


def from_checkpoint(values: dict) -> Config:
    """from_dict, of values that name the whole shape of a model: a default would stand for weights of another one."""
    for shape in dataclasses.fields(ModelConfig):
        if shape.name not in values:
            raise UserError(f"{shape.name}: not among its settings")
    return from_dict(values)


def parse(name: str, text: str):
    """The value that `text` means for setting `name`: 1e3 is an int too, booleans are true or false."""
    kind = _kind(name)
    if kind is bool:
        return _one_of(name, text.lower(), ("true", "false")) == "true"
    for number in {int: (int, _whole), float: (float,)}.get(kind, ()):
        with contextlib.suppress(ValueError):
            return number(text)
    if kind is not str and not typing.get_args(kind):
        raise UserError(f"{name}={text}: expected {kind.__name__}")
    return text


def _whole(text: str) -> int:
    number = float(text)
    if not number.is_integer():
        raise ValueError
    return int(number)


def _kind(name: str):
    kinds = typing.get_type_hints(Config)
    if name not in kinds:
        near = difflib.get_close_matches(name, kinds, n=1)
        hint = f"did you mean {near[0]}?" if near else "python train.py --help lists them all"
        raise UserError(f"{name}: no such setting; {hint}")
    return kinds[name]


def _one_of(name: str, value, choices):
    if value not in choices:
        raise UserError(f"{name}={value}: expected one of {', '.join(choices)}")
    return value


def from_command_line(argv: list[str]) -> Config:
    """load(argv), ending the process with status 0 after --help and with status 2 and one line after a mistake."""
    if "--help" in argv or "-h" in argv:
        print(usage())
        sys.exit(0)
    try:
        return load(argv)
    except UserError as e:
        if os.environ.get("RANK", "0") == "0":
            print(e, file=sys.stderr)
        sys.exit(2)


def usage() -> str:
    """One line a setting: name, type, default, meaning."""
    kinds = typing.get_type_hints(Config)
    lines = ["usage: python train.py [CONFIG.py] [--name=value ...]", ""]
    for f in dataclasses.fields(Config):
        choices = typing.get_args(kinds[f.name])
        kind = "|".join(choices) if choices else kinds[f.name].__name__
        lines.append(f"  --{f.name:<19} {kind:<20} {f.default!r:<17} {f.metadata['doc']}")
    return "\n".join(lines)

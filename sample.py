"""Continues a prompt with text sampled from a model.

    python sample.py runs/tiny --prompt 'the quick brown fox jumps. the qui'
    python sample.py runs/tiny/ckpt.pt --temperature=1 --top_k=50 --num_samples=3 --seed=7
    python sample.py path/to/a-hugging-face-llama --prompt=- --temperature=0 < essay.txt

A continuation ends with its document, after --max_new_tokens, or where the model's context is full.
"""

import sys

from cli import Parser, exit_on_interrupt, quiet_pipe, run_command
from errors import UserError, about

if __name__ == "__main__":
    exit_on_interrupt()  # importing torch takes seconds

import argparse
import itertools
from collections.abc import Iterable, Iterator

import torch

import kernels
from config import from_checkpoint
from data.tokenizer import Tokenizer, tokenizer_from_state
from hf import folder as huggingface
from model import Llama
from runtime import checkpoint, distributed


def load(path, device="auto", ops="auto") -> tuple[Llama, Tokenizer, int]:
    """Returns the model, tokenizer and step of a checkpoint, a run directory or a Hugging Face folder."""
    state = huggingface.load(path)
    with about(path):
        config = from_checkpoint(state["config"])
    device = distributed.pick_device(device)
    dtype = distributed.pick_dtype("auto", device)
    ops = kernels.choose(ops, device, config.head_dim, dtype)
    with torch.device("meta"):  # the weights keep the dtype of their file
        model = Llama(config, ops, dtype)
    checkpoint.restore(path, state, model)
    if not all(p.isfinite().all() for p in model.parameters()):
        raise UserError(f"{path}: has weights that are not finite; take an earlier checkpoint")
    model.to(device)
    with about(path):
        tokenizer = tokenizer_from_state(state["tokenizer"])
    if tokenizer.size > config.vocab_size:
        raise UserError(f"{path}: its tokenizer has {tokenizer.size} ids, but its model has {config.vocab_size}")
    return model.eval(), tokenizer, state["step"]


def prompt_ids(model: Llama, tokenizer: Tokenizer, text: str) -> list[int]:
    """Returns the ids of a prompt, bos first where there is one. Raises UserError unless it leaves room in the context."""
    try:
        text.encode()
    except UnicodeEncodeError:  # a command line holds each byte that is not UTF-8 as half of a surrogate pair
        raise UserError("prompt: the text is not valid UTF-8") from None
    ids = ([] if tokenizer.bos is None else [tokenizer.bos]) + (list(map(int, tokenizer.encode(text))) if text else [])
    if not ids:
        raise UserError("an empty prompt cannot be continued without a bos; pass --prompt")
    if len(ids) >= model.config.seq_len:
        raise UserError(f"prompt of {len(ids)} tokens: this model's context takes 1 to {model.config.seq_len - 1}")
    return ids


def decoded(tokenizer: Tokenizer, ids: Iterable[int], before=()) -> Iterator[str]:
    """Yields, for each of `ids`, which come after the ids `before`, the text that it completes ("" until a character of several
    ids is complete), and finally any incomplete bytes. A sentencepiece model needs all ids to decode one.
    """
    seen = list(before)
    text = tokenizer.decode(seen)
    shown = len(text)
    for i in ids:
        seen.append(i)
        text = tokenizer.decode(seen)
        whole = max(len(text.rstrip("\ufffd")), shown)  # U+FFFD stands for bytes that are no character, or not yet
        yield text[shown:whole]
        shown = whole
    yield text[shown:]


def stream(model: Llama, tokenizer: Tokenizer, text: str, n=200, temperature=0.0, top_k=0) -> Iterator[str]:
    """Yields the continuation of `text` piece by piece: up to n tokens, or to the end of the document or of the context."""
    ids = prompt_ids(model, tokenizer, text)
    ends = tokenizer.special | {tokenizer.bos, tokenizer.eos}  # a Llama may have several ids that end a text
    new = model.generate(torch.tensor([ids], device=model.embed.weight.device), n, temperature, top_k)
    new = itertools.takewhile(lambda i: i not in ends, (token.item() for token in new))
    return decoded(tokenizer, new, ids)


def write_samples(model: Llama, tokenizer: Tokenizer, prompt: str, samples=1, n=200, temperature=0.0, top_k=0):
    """Prints the prompt and its continuation as it is generated; a line separates several samples."""
    for i in range(samples):
        pieces = stream(model, tokenizer, prompt, n, temperature, top_k)
        for piece in itertools.chain(["-" * 15 + "\n"] if i else [], [prompt], pieces, ["\n"]):
            print(piece, end="", flush=True)


def parse(argv: list[str]) -> argparse.Namespace:
    parser = Parser(prog="python sample.py", description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("path", metavar="PATH", help="checkpoint, run directory, or folder of a Hugging Face Llama")
    add("--prompt", default="", metavar="TEXT", help="text to continue; - reads it from stdin (default: begin a document)")
    add("--temperature", type=float, default=0.8, metavar="X", help="0: always the most likely token (default: 0.8)")
    add("--top_k", type=int, default=200, metavar="N", help="sample from the N most likely tokens; 0: all (default: 200)")
    add("--seed", type=int, default=0, metavar="N", help="random seed (default: 0)")
    add("--num_samples", type=int, default=1, metavar="N", help="number of continuations (default: 1)")
    add(
        "--max_new_tokens",
        type=int,
        default=200,
        metavar="N",
        help="maximum number of new tokens per continuation (default: 200)",
    )
    add("--device", default="auto", help="auto, cuda, cuda:1, mps or cpu (default: auto)")
    args = parser.parse_args(argv)
    for name in ("temperature", "top_k", "seed", "num_samples", "max_new_tokens"):
        if not 0 <= getattr(args, name) < 2**63:
            parser.error(f"--{name}={getattr(args, name)}: expected 0 or more")
    return args


def main(argv: list[str]) -> int:
    args = parse(argv)
    model, tokenizer, _ = load(args.path, args.device)
    try:
        prompt = sys.stdin.read() if args.prompt == "-" else args.prompt
    except UnicodeDecodeError:
        raise UserError("--prompt=-: the text on stdin is not valid UTF-8") from None
    torch.manual_seed(args.seed)
    with quiet_pipe():
        write_samples(model, tokenizer, prompt, args.num_samples, args.max_new_tokens, args.temperature, args.top_k)
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:]))

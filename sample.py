"""Continues a prompt with text that the model draws, token by token.

    python sample.py runs/tiny --prompt 'the quick brown fox jumps. the qui'
    python sample.py runs/tiny/ckpt.pt --temperature=1 --top_k=50 --num_samples=3 --seed=7
    python sample.py path/to/a-hugging-face-llama --prompt=- --temperature=0 < essay.txt
"""

import sys

from errors import exit_on_interrupt, raise_on_interrupt, run_command

if __name__ == "__main__":
    exit_on_interrupt()  # importing torch takes seconds

import argparse

import torch

from config import Parser
from eval_copy import load, stream


def parse(argv: list[str]) -> argparse.Namespace:
    parser = Parser(prog="python sample.py", description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("path", metavar="PATH", help="checkpoint, run directory, or folder of a Hugging Face Llama")
    add("--prompt", default="", metavar="TEXT", help="text to continue; - reads it from stdin (default: begin a document)")
    add("--temperature", type=float, default=0.8, metavar="X", help="0: always the likeliest token (default: 0.8)")
    add("--top_k", type=int, default=200, metavar="N", help="draw among the N likeliest tokens; 0: all (default: 200)")
    add("--seed", type=int, default=0, metavar="N", help="of the draws (default: 0)")
    add("--num_samples", type=int, default=1, metavar="N", help="continuations (default: 1)")
    add("--max_new_tokens", type=int, default=200, metavar="N", help="of each, within the model's context (default: 200)")
    add("--device", default="auto", help="auto, cuda, cuda:1, mps or cpu (default: auto)")
    args = parser.parse_args(argv)
    for name in ("temperature", "top_k", "seed", "num_samples", "max_new_tokens"):
        if not 0 <= getattr(args, name) < 2**63:
            parser.error(f"--{name}={getattr(args, name)}: expected 0 or more")
    return args


def main(argv: list[str]) -> int:
    args = parse(argv)
    model, tokenizer, _ = load(args.path, args.device)
    prompt = sys.stdin.read() if args.prompt == "-" else args.prompt
    torch.manual_seed(args.seed)
    for i in range(args.num_samples):
        pieces = stream(model, tokenizer, prompt, args.max_new_tokens, args.temperature, args.top_k)
        print("-" * 15 + "\n" if i else "", prompt, sep="", end="", flush=True)
        for piece in pieces:
            print(piece, end="", flush=True)
        print()
    return 0


if __name__ == "__main__":
    raise_on_interrupt()
    sys.exit(run_command(main, sys.argv[1:]))

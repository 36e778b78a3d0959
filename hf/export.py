"""Writes a checkpoint as a folder that Hugging Face's transformers loads: LlamaForCausalLM, and AutoTokenizer.

    python -m hf.export runs/tiny exported/tiny
    python train.py configs/tiny.py --init_from=exported/tiny --out_dir=runs/more     the way back

The weights are fp32, and the logits those of model.py but for rounding. Exit status: 0 done; 2 a mistake in what was asked,
said in one line; 4 a disk that is full.
"""

import errno
import sys
from pathlib import Path

from config import Parser, from_checkpoint
from data.tokenizer import tokenizer_from_state
from errors import UserError
from hf import folder as huggingface
from runtime import checkpoint


def export(path, folder) -> str:
    """Writes the checkpoint (a file, or a run directory) at `path` into `folder`; returns how to load it, in a few lines."""
    state = checkpoint.load(path)
    try:
        from_checkpoint(state["config"])
    except UserError as e:
        raise UserError(f"{path}: {e}") from None
    tokenizer = tokenizer_from_state(state["tokenizer"])
    has_tokenizer_json = huggingface.write(folder, state, tokenizer)
    size = sum(p.stat().st_size for p in Path(folder).iterdir())
    lines = [
        f"{folder}: step {state['step']}, {size / 1e6:,.1f} MB; load it with",
        f'    transformers.LlamaForCausalLM.from_pretrained("{folder}")',
    ]
    if has_tokenizer_json:
        lines.append(f'    transformers.AutoTokenizer.from_pretrained("{folder}")')
    elif tokenizer.kind == "sentencepiece":
        lines.append("the tokenizer has no equal in tokenizer.json: use the sentencepiece package with its tokenizer.model")
    else:
        lines.append(f"no tokenizer was written: the checkpoint's is of kind {tokenizer.kind}; pass token ids")
    return "\n".join(lines)


def main(argv: list[str]) -> int:
    parser = Parser(prog="python -m hf.export", description=__doc__.split("\n")[0])
    parser.add_argument("checkpoint", metavar="CKPT", help="checkpoint, or run directory")
    parser.add_argument("folder", metavar="DIR", help="folder to write: new, or empty")
    args = parser.parse_args(argv)
    try:
        print(export(args.checkpoint, args.folder))
        return 0
    except UserError as e:
        problem, status = str(e), 2
    except OSError as e:
        problem, status = f"{e.filename or args.folder}: {e.strerror}", 4 if e.errno in (errno.ENOSPC, errno.EDQUOT) else 2
    print(problem, file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

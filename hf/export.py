"""Writes a checkpoint as a folder that Hugging Face's transformers loads: LlamaForCausalLM, and AutoTokenizer.

    python -m hf.export runs/tiny exported/tiny
    python train.py configs/tiny.py --init_from=exported/tiny --out_dir=runs/more     the way back

The weights are fp32. The logits differ from those of model.py by rounding alone, which grows with their size: up to about
3e-6 times the largest logit.
"""

import sys
from pathlib import Path

from cli import Parser, run_command
from config import from_checkpoint
from data.tokenizer import tokenizer_from_state
from errors import UserError, about
from hf import folder as hf_folder
from runtime import checkpoint


def export(path, folder) -> str:
    """Writes the checkpoint at `path`, a file or a run directory, into `folder`; returns a few lines on how to load it."""
    if hf_folder.is_folder(Path(path)):
        raise UserError(f"{path}: already a Hugging Face folder; hf.export takes a checkpoint or a run directory")
    state = checkpoint.load(path)
    with about(path):
        from_checkpoint(state["config"])
        tokenizer = tokenizer_from_state(state["tokenizer"])
    has_tokenizer_json = hf_folder.write(folder, state, tokenizer)
    size = sum(p.stat().st_size for p in Path(folder).iterdir())
    lines = [
        f"{folder}: step {state['step']}, {size / 1e6:,.1f} MB; load it with",
        f'    transformers.LlamaForCausalLM.from_pretrained("{folder}")',
    ]
    if has_tokenizer_json:
        lines.append(f'    transformers.AutoTokenizer.from_pretrained("{folder}")')
    elif tokenizer.kind == "sentencepiece":
        lines.append("this tokenizer cannot be converted to tokenizer.json: use the sentencepiece package with tokenizer.model")
    else:
        lines.append(f"no tokenizer was written, because the checkpoint has none ({tokenizer.kind}): pass token ids")
    return "\n".join(lines)


def main(argv: list[str]) -> int:
    parser = Parser(prog="python -m hf.export", description=__doc__.split("\n")[0])
    parser.add_argument("checkpoint", metavar="CKPT", help="checkpoint, or run directory")
    parser.add_argument("folder", metavar="DIR", help="folder to write: new, or empty")
    args = parser.parse_args(argv)
    print(export(args.checkpoint, args.folder))
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:]))

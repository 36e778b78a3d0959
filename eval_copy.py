"""How well does a checkpoint copy from its context, and which heads do it?

    python eval_copy.py runs/tiny/ckpt.pt                      the scores, as a table
    python eval_copy.py runs/tiny --plot copy.png --json copy.json
    python eval_copy.py runs/tiny/ckpt.pt --ablate=zero        and how it copies without its best induction heads
    python eval_copy.py runs/tiny --over_steps                 each checkpoint kept, into measures.jsonl
    python eval_copy.py runs/tiny/ckpt.pt --prompt 'text to go on with'

What is measured, and by which definition, is in measures/.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import torch

import kernels
from config import Parser, from_checkpoint
from data import bins
from data.tokenizer import Tokenizer, tokenizer_from_state
from errors import UserError, is_out_of_memory
from hf import folder as huggingface
from measures import ablation, context, heads
from measures.copying import PREFIX, SUFFIX, CopyTest, K, alphabet_ids, answers, copy_scores, kgrams, make_test
from model import Llama
from runtime import checkpoint, distributed, metrics

ALPHABETS = ("full", "hex16")
REMOVED = (0, 1, 2, 4, 8, 16, 32)  # heads, by --ablate
TITLES = {  # of measures/heads.py
    "score_mended": "induction score I",
    "induction": "induction, attention",
    "prefix_matching": "prefix matching",
    "previous": "previous token",
    "duplicate": "duplicate token",
}


def training_row(model: Llama, tokenizer: Tokenizer, tests: dict[str, CopyTest]) -> dict:
    """What metrics.jsonl keeps of the copy test during training."""
    row = {}
    for name, test in tests.items():
        scores = copy_scores(test, answers(model, test))
        row |= {f"copy_exact_{name}": scores["exact"], f"copy_token_{name}": scores["token"]}
    induction = heads.attention_scores(model, alphabet_ids(tokenizer, "full"), tokenizer.bos, samples=8)["induction"]
    row["induction_max"] = float(induction.max())
    model.train()
    return row


def load(path, device="auto", ops="auto") -> tuple[Llama, Tokenizer, int]:
    """The model, vocabulary and step of a checkpoint, a run directory or a Hugging Face folder."""
    state = huggingface.load(path)
    try:
        config = from_checkpoint(state["config"])
    except UserError as e:
        raise UserError(f"{path}: {e}") from None
    device = distributed.pick_device(device)
    ops = kernels.choose(ops, device, config.head_dim)
    model = Llama(config.model(), ops, distributed.pick_dtype("auto", device)).to(device)
    checkpoint.restore(path, state, model)
    tokenizer = tokenizer_from_state(state["tokenizer"])
    if tokenizer.size > config.vocab_size:
        raise UserError(f"{path}: its tokenizer has {tokenizer.size} ids, but its model knows {config.vocab_size}")
    return model.eval(), tokenizer, state["step"]


def evaluate(path, alphabets, samples: int, separator=False, seq_len=0, ablate="", data="", device="auto", ops="auto") -> dict:
    """All scores of one checkpoint. seq_len: the context of the copy test, 0 for the model's own; ablate: how to remove heads,
    see measures.ablation; data: a prepared folder, for the loss by position on its val.bin.
    """
    model, tokenizer, step = load(path, device, ops)
    ids, copying = alphabet_ids(tokenizer, "full"), {}
    for name in alphabets:
        test = make_test(tokenizer, name, seq_len or model.config.seq_len, samples, separator=separator)
        said = answers(model, test)
        scale = {"ids": len(np.unique(test.contexts)), "sequences": test.contexts.shape[1], "samples": samples}
        scale |= {"separator": test.separator, "questions": test.hash()}
        copying[name] = scale | copy_scores(test, said) | {"kgram": kgrams(test, said)}
    n = sum(p.numel() for p in model.parameters())
    about = {"path": str(path), "step": step, "parameters": n, "seq_len": model.config.seq_len}
    found = heads.scores(model, ids, tokenizer.bos)
    result = about | {"copy": copying, "heads": {name: scores.tolist() for name, scores in found.items()}}
    result["context"] = {
        "induction_loss": context.induction_loss(model, ids, tokenizer.bos),
        "recall": context.associative_recall(model, ids, tokenizer.bos),
        "pairs": context.key_values(model, ids, tokenizer.bos),
    }
    if data:
        val = bins.Bin(Path(data) / "val.bin", model.config.seq_len, model.config.vocab_size)
        losses = context.position_losses(model, val.windows(bins.order(0, 0, val.n_windows)[:64]))
        late = {f"icl_50_{n}": context.icl_score(losses, 50, n) for n in (500, 1000)}
        result["positions"] = late | {"loss": losses.tolist()}
    if ablate:
        test = make_test(tokenizer, alphabets[0], seq_len or model.config.seq_len, min(samples, 100), separator=separator)
        means = ablation.head_means(model, heads.repeated(ids, heads.fitting(model, 100, tokenizer.bos), 32, 1, tokenizer.bos))
        result["ablation"] = ablation.ablation_curve(
            model, lambda model: copy_scores(test, answers(model, test))["exact"], found["score_mended"],
            ks=[k for k in REMOVED if k <= found["score_mended"].size // 2], how=ablate, means=means,
        )  # fmt: skip
    return result


def over_steps(run: Path, samples: int, seq_len=0, device="auto", ops="auto"):
    """Adds a row to a run's measures.jsonl for each checkpoint it has kept, milestones too, that has none there yet."""
    file = run / "measures.jsonl"
    rows = {row["step"]: row for row in metrics.read(file)} if file.exists() else {}
    found = {int(path.stem.split("_")[1]): path for kind in ("milestone", "ckpt") for path in run.glob(f"{kind}_*.pt")}
    if not found:
        raise UserError(f"{run}: no checkpoints of several steps; train with --ckpt_keep=1000 or --ckpt_milestones=true")
    tests = {}
    for step in sorted(found.keys() - rows.keys()):
        model, tokenizer, _ = load(found[step], device, ops)
        tests = tests or {name: make_test(tokenizer, name, seq_len or model.config.seq_len, samples) for name in ALPHABETS}
        ids, row = alphabet_ids(tokenizer, "full"), {"step": step, "path": found[step].name}
        for name, test in tests.items():
            said = answers(model, test)
            scores, readers = copy_scores(test, said), kgrams(test, said)
            row |= {f"copy_{key}_{name}": scores[key] for key in ("exact", "token", "first", "logprob")}
            row |= {f"{key}_{name}": list(readers[key].values()) for key in ("uses", "ceiling")}
            row |= {f"questions_{name}": test.hash()}
        attention = heads.attention_scores(model, ids, tokenizer.bos, samples=8)
        score = heads.paper_score(attention, heads.eigenvalue_score(model), heads.eigenvalue_score(model, folded=True))
        row |= {"induction": attention["induction"].tolist(), "score_mended": score["mended"].tolist()}
        row |= {"recall": context.associative_recall(model, ids, tokenizer.bos)["accuracy"]}
        row |= {"pairs": context.key_values(model, ids, tokenizer.bos)}
        rows[step] = row
        text = "".join(json.dumps(rows[step]) + "\n" for step in sorted(rows))
        aside = file.with_suffix(".tmp")
        aside.write_text(text)
        aside.replace(file)
        print(
            f"step {step}: exact match " + ", ".join(f"{name} {row[f'copy_exact_{name}']:.3f}" for name in ALPHABETS),
            flush=True,
        )


def table(result: dict) -> str:
    """The scores of one checkpoint for people to read."""
    lines = [f"{result['path']}: step {result['step']}, {result['parameters']:,} parameters, context {result['seq_len']}"]
    one = next(iter(result["copy"].values()))
    separated = "" if one["separator"] is None else ", a separator after each"
    lines += [
        f"copy test: {one['sequences']} sequences of {PREFIX}+{SUFFIX} tokens{separated}, "
        f"{len(one['exact_by_sequence'])} of them asked, {one['samples']} samples: {one['queries']:,} queries",
        "",
        f"  {'':<18}{'exact':>7}{'(95% interval)':>19}{'token':>8}{'first':>8}{'log p':>8}   questions",
    ]
    for name, c in result["copy"].items():
        cells = "".join(f"{c[key]:8.3f}" for key in ("token", "first", "logprob"))
        interval = "({:.3f} to {:.3f})".format(*c["interval"])
        title = f"{name} ({c['ids']:,} ids)"
        lines.append(f"  {title:<18}{c['exact']:7.3f}{interval:>19}{cells}   {c['questions']}")
    lines += [
        "",
        f"  {'readers of':<18}{'exact match of one of k tokens':<31}the model goes by token k back",
        f"  {'':<18}" + "".join(f"k = {k}  " for k in K) + "   " + "".join(f"k = {k}  " for k in K) + " like",
    ]
    for name, c in result["copy"].items():
        ceilings = "".join(f"{c['kgram']['ceiling'][k]:5.3f}  " for k in K)
        uses = "".join("    -  " if (use := c["kgram"]["uses"][k]) is None else f"{use:5.2f}  " for k in K)
        lines.append(f"  {name:<18}{ceilings}   {uses} k = {c['kgram']['like']}")
    lines += ["", f"  {'heads':<30}best"]
    for name, title in TITLES.items():
        scores = np.array(result["heads"][name])
        best = np.dstack(np.unravel_index(np.argsort(-scores, axis=None)[:3], scores.shape))[0]
        lines.append(f"  {title:<30}" + "   ".join(f"layer {i} head {j}: {scores[i, j]:.3f}" for i, j in best))
    (first, second), (recall, rank) = (result["context"][name].values() for name in ("induction_loss", "recall"))
    lines += [
        "",
        f"  {'loss on random tokens':<30}{first:.3f}   on the same again: {second:.3f}",
        f"  {'recall, in order':<30}{recall:.3f}   mean rank of the right token: {rank:.1f}",
        f"  {'key to value, in any order':<30}{result['context']['pairs']:.3f}",
    ]
    if p := result.get("positions"):
        at = [i for i in (1, 10, 50, 100, 500, 1000, len(p["loss"])) if i <= len(p["loss"])]
        lines += ["", f"  {'loss by position in context':<30}" + "   ".join(f"{i:,}: {p['loss'][i - 1]:.3f}" for i in at)]
        icl = (f"(50, {n}) {p[f'icl_50_{n}']:+.3f}" for n in (500, 1000) if p[f"icl_50_{n}"] is not None)
        lines.append(f"  {'in-context learning score':<30}" + ("   ".join(icl) or "none: it takes a context of 500"))
    if "ablation" in result:
        a = result["ablation"]
        lines += ["", f"  {'exact match without k heads':<30}" + "".join(f"{k:>8}" for k in a["k"])]
        lines.append(f"  {'the best by induction score':<30}" + "".join(f"{x:8.3f}" for x in a["top"]))
        means = ["       -" if not x else f"{np.mean(x):8.3f}" for x in a["random"]]
        lines.append(f"  {'as many others, by layer':<30}" + "".join(means))
    return "\n".join(lines)


def go_on(path, text: str, device="auto", ops="auto", n=200):
    """Prints the prompt and the likeliest continuation, up to n tokens, or to the context's end."""
    model, tokenizer, _ = load(path, device, ops)
    ids = ([] if tokenizer.bos is None else [tokenizer.bos]) + list(tokenizer.encode(text))
    if not ids or len(ids) >= model.config.seq_len:
        raise UserError(f"--prompt: {len(ids)} tokens; this model's context takes 1 to {model.config.seq_len - 1}")
    prompt = torch.tensor([ids], device=model.embed.weight.device)
    new = [token.item() for token in model.generate(prompt, n, stop=tokenizer.bos)]
    print(text + tokenizer.decode(ids + new)[len(tokenizer.decode(ids)) :])


def parse(argv: list[str]) -> argparse.Namespace:
    parser = Parser(prog="python eval_copy.py", description=__doc__.split("\n")[0])
    parser.add_argument("paths", nargs="+", metavar="PATH", help="checkpoint, run directory, or folder of a Hugging Face Llama")
    parser.add_argument("--alphabet", nargs="+", default=ALPHABETS, metavar="NAME", help="full, hex16 or a number of ids")
    parser.add_argument("--samples", type=int, default=500, metavar="N", help="samples per alphabet (default: 500)")
    parser.add_argument(
        "--separator", action="store_true", help="put a line end after each sequence, as in the paper's Figure 1"
    )
    parser.add_argument("--context", type=int, default=0, metavar="N", help="of the copy test (default: the model's own)")
    parser.add_argument(
        "--ablate", choices=ablation.HOW, default="", help="copying without the best induction heads: how to remove them"
    )
    parser.add_argument("--data", default="", metavar="FOLDER", help="prepared data: the loss by position on its val.bin")
    parser.add_argument("--over_steps", action="store_true", help="measure each checkpoint of a run, into its measures.jsonl")
    parser.add_argument("--json", metavar="FILE", help="write all scores there too")
    parser.add_argument("--plot", metavar="FILE.png", help="draw the heads, and a run directory's curves over steps")
    parser.add_argument("--prompt", metavar="TEXT", help="instead of the scores: text for the model to go on with")
    parser.add_argument("--device", default="auto", help="auto, cuda, mps or cpu")
    parser.add_argument("--kernels", choices=("auto", "fused", "sdpa", "eager"), default="auto", help="op set of the model")
    args = parser.parse_args(argv)
    if args.samples < 1:
        parser.error(f"--samples={args.samples}: expected 1 or more")
    return args


def main(argv: list[str]) -> int:
    args = parse(argv)
    try:
        if args.prompt is not None:
            go_on(args.paths[0], args.prompt, args.device, args.kernels)
            return 0
        if args.over_steps:
            for path in args.paths:
                over_steps(Path(path), args.samples, args.context, args.device, args.kernels)
            return 0
        results = []
        how = args.separator, args.context, args.ablate, args.data, args.device, args.kernels
        for path in args.paths:
            results.append(evaluate(path, args.alphabet, args.samples, *how))
            print(table(results[-1]), end="\n\n", flush=True)
        if args.json:
            Path(args.json).write_text(json.dumps(results, indent=1) + "\n")
        if args.plot:
            from runtime import plots

            plots.draw(args.plot, results)
            print(f"picture: {args.plot}")
        return 0
    except (UserError, OSError) as e:
        problem = str(e)
    except (RuntimeError, MemoryError) as e:
        if not is_out_of_memory(e):
            raise
        problem = "out of memory; try --device=cpu, or another machine"
    print(problem, file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

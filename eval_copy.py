"""Measures how well a model copies from its context, and which attention heads do it.

    python eval_copy.py runs/tiny/ckpt.pt                         the scores, as a table
    python eval_copy.py runs/tiny --plot copy.png --json copy.json
    python eval_copy.py runs/text --data data/text                also on held-out text, and the loss by position
    python eval_copy.py runs/tiny/ckpt.pt --ablate=zero           also how well it copies without its best induction heads
    python eval_copy.py runs/tiny --over_steps                    every checkpoint of a run, into its measures.jsonl
    python eval_copy.py runs/tiny --attention 'some text' page.html    a page that shows where each head looks
    python eval_copy.py runs/tiny/ckpt.pt --prompt 'some text'    continues the text instead; sample.py has more options

Every score is defined in measures/; docs/measures.md lists them with their sources.
"""

import sys

from cli import Parser, exit_on_interrupt, quiet_pipe, run_command, say
from errors import UserError

if __name__ == "__main__":
    exit_on_interrupt()  # importing torch takes seconds

import argparse
import json
from pathlib import Path

import numpy as np

from config import TYPES
from data import bins
from data.tokenizer import Tokenizer, load_tokenizer
from files import atomic_write, check_output
from hf import folder as huggingface
from measures import ablation, attention, context, heads
from measures.alphabets import Vocabulary, alphabet, default_alphabets
from measures.batching import affordable, progress
from measures.copying import LENGTH, SEQUENCES, CopyTest, copy_scores, make_test, predict
from measures.kgrams import kgram_baseline
from measures.table import table
from model import Llama
from runtime import checkpoint, metrics, validation
from sample import decoded, load, prompt_ids, write_samples

TEXT_TOKENS = 2**20  # of val.bin that passages of held-out text are drawn from
# The measures beside copying: samples for a small model, and the tokens of one. A large model gets fewer (see affordable).
SAMPLES = {
    "heads": (32, 2 * heads.LENGTH), "induction_loss": (32, 2 * context.INDUCTION_LENGTH),
    "recall": (100, 2 * context.RECALL_LENGTH), "pairs": (100, 4 * context.PAIRS),
}  # fmt: skip


def vocabulary(tokenizer: Tokenizer) -> Vocabulary:
    ids = np.array([i for i in range(tokenizer.size) if i not in tokenizer.special])
    counts = tokenizer.counts
    return Vocabulary(ids, tokenizer.hex_ids(), None if counts is None else counts[ids] / counts.sum())


def make_tests(tokenizer: Tokenizer, seq_len: int, samples: int, names=None, text=None) -> dict[str, CopyTest]:
    """Returns copy tests by the name of their alphabet. text (n,): held-out ids, from which the alphabet `text` is drawn."""
    ours = vocabulary(tokenizer)
    tests = {}
    for name in names or default_alphabets(ours) + ["text"] * (text is not None):
        if name == "text" and text is None:
            raise UserError("alphabet=text: needs held-out text; pass --data=FOLDER, a prepared folder")
        ids = text if name == "text" else alphabet(ours, name)
        try:
            tests[name] = make_test(ids, seq_len, tokenizer.bos, samples, passages=name == "text")
        except UserError:
            if names or name != "text":  # too little text, which nobody asked for by name
                raise
    return tests


def measure(model: Llama, tokenizer: Tokenizer, tests: dict[str, CopyTest]) -> dict:
    """Returns all scores of a model: {"copy": {alphabet: scores}, "heads": {score: (n_layers, n_heads)}, "context": scores}.

    A progress bar on stderr counts the tokens that the model reads. The model is left in eval mode.
    """
    ours, bos = vocabulary(tokenizer), tokenizer.bos
    copy = {}
    lengths = {name: min(tokens, model.config.seq_len) for name, (_, tokens) in SAMPLES.items()}
    n = {name: affordable(model, lengths[name], most) for name, (most, _) in SAMPLES.items()}
    with progress(model, sum(test.cost() for test in tests.values()) + sum(n[name] * lengths[name] for name in n), "scores"):
        for name, test in tests.items():
            predictions = predict(model, test)
            copy[name] = copy_scores(test, predictions)
            copy[name] |= {"samples": len(test.sequences), "sequences": test.sequences.shape[1]}
            copy[name] |= {"ids": len(test.alphabet), "untrained": ours.untrained(test.alphabet), "questions": test.hash()}
            copy[name]["kgram"] = kgram_baseline(test, predictions)
        found = {
            "induction_loss": context.induction_loss(model, ours.ids, bos, n["induction_loss"]),
            "recall": context.associative_recall(model, ours.ids, bos, n["recall"]),
            "pairs": context.key_values(model, ours.ids, bos, n["pairs"]),
        }
        return {"copy": copy, "heads": heads.scores(model, ours.ids, bos, n["heads"]), "context": found}


def as_row(scores: dict) -> dict:
    """Returns the scores as a row of metrics.jsonl or, in full, of measures.jsonl."""
    row = {}
    for name, c in scores["copy"].items():
        row |= {f"copy_exact_{name}": c["exact"], f"copy_token_{name}": c["token"]}
        if "kgram" in c:
            row |= {f"copy_{key}_{name}": c[key] for key in ("first", "logprob", "logprob_unseen")}
            row |= {f"{key}_{name}": list(c["kgram"][key].values()) for key in ("uses", "ceiling")}
            row[f"questions_{name}"] = c["questions"]
    for name, values in scores["heads"].items():
        if heads.SCORES[name].headline:
            row[f"{name}_max"] = float(values.max())
        if heads.SCORES[name].title and "context" in scores:
            row[name] = values.tolist()
    if "context" in scores:
        row |= {"recall": scores["context"]["recall"]["accuracy"], "pairs": scores["context"]["pairs"]}
    return row


def training_row(model: Llama, tokenizer: Tokenizer, tests: dict[str, CopyTest]) -> dict:
    """Returns the scores that a run logs: copying, and where the heads look. The model is left in training mode."""
    copy = {name: copy_scores(test, predict(model, test)) for name, test in tests.items()}
    looks = heads.attention_scores(model, vocabulary(tokenizer).ids, tokenizer.bos, samples=8)
    model.train()
    return as_row({"copy": copy, "heads": looks})


def context_length(model: Llama, asked: int) -> int:
    if asked > model.config.seq_len:
        raise UserError(f"--context={asked}: this model's context is {model.config.seq_len}")
    return asked or model.config.seq_len


def copy_samples(model: Llama, seq_len: int, args: argparse.Namespace) -> int:
    """Returns --samples, or the default: 10 to 500 per alphabet, chosen so that the test takes minutes."""
    tokens = min(2 * seq_len, (SEQUENCES + 10) * LENGTH)  # of a sample: the sequences, and a question after every fifth
    return args.samples or affordable(model, tokens, most=500, least=10, share=5)


def evaluate(path, args: argparse.Namespace) -> dict:
    """Returns all scores of one checkpoint, as requested by the command-line options."""
    model, tokenizer, step = load(path, args.device, args.kernels)
    if tokenizer.kind == "ids" and huggingface.is_folder(Path(path)):
        missing = "has neither tokenizer.json nor tokenizer.model: it has no bos, and hex16 is 16 random ids"
        print(f"warning: {path} {missing}", file=sys.stderr)
    seq_len = context_length(model, args.context)
    samples = copy_samples(model, seq_len, args)
    result = {"path": str(path), "step": step, "parameters": model.config.n_parameters, "seq_len": model.config.seq_len}
    val = open_held_out(args.data, seq_len, model, tokenizer) if args.data else None
    text = None
    if val:  # consecutive windows are consecutive text; each ends with the first token of the next
        text = val.windows(range(min(val.n_windows, -(-TEXT_TOKENS // seq_len))))[:, :-1].flatten()
    scores = measure(model, tokenizer, make_tests(tokenizer, seq_len, samples, args.alphabet, text))
    result |= scores | {"heads": {name: values.tolist() for name, values in scores["heads"].items()}}
    if val:
        windows = val.windows(bins.order(0, 0, val.n_windows)[: affordable(model, seq_len, most=1000, share=2)])
        result["positions"] = context.position_scores(model, windows)
    ids, bos = vocabulary(tokenizer).ids, tokenizer.bos
    if args.ablate:
        name = next(iter(scores["copy"]))
        (test,) = make_tests(tokenizer, seq_len, min(samples, 100), [name], text).values()
        held_out = (windows[:64], validation.repeated(windows[:64])) if val else None
        ranking = scores["heads"]["score_mended"]
        result["ablation"] = {"alphabet": name, "samples": len(test.sequences)}
        result["ablation"] |= ablation.scores_without_heads(model, test, ranking, args.ablate, ids, held_out)
    if args.plot:
        result["stripes"] = attention.stripes(model, ids, bos, scores["heads"])
    return result


def open_held_out(folder: str, seq_len: int, model: Llama, tokenizer: Tokenizer) -> bins.Bin:
    """Returns the held-out text of a prepared folder. Raises UserError if it is too short, or of another tokenizer."""
    val = bins.Bin(Path(folder) / "val.bin", seq_len, model.config.vocab_size, option="--context")
    theirs, ids = load_tokenizer(folder, model.config.vocab_size), val.windows([0])[0].tolist()
    if "ids" not in (tokenizer.kind, theirs.kind) and tokenizer.decode(ids) != theirs.decode(ids):
        raise UserError(f"--data={folder}: its tokenizer is not the model's; pass data prepared with the model's tokenizer")
    return val


def over_steps(run: Path, args: argparse.Namespace):
    """Adds a row to a run's measures.jsonl for each checkpoint, milestones included, that has none yet."""
    if run.is_file():
        raise UserError(f"{run}: --over_steps takes a run directory; pass {run.parent}")
    file = run / "measures.jsonl"
    rows = {row["step"]: row for row in metrics.read(file)} if file.exists() else {}
    found = checkpoint.by_step(run, "milestone") | checkpoint.by_step(run)
    if not found:
        raise UserError(f"{run}: no checkpoints of several steps; train with --ckpt_keep=1000 or --ckpt_milestones=true")
    tests = {}
    missing = sorted(found.keys() - rows.keys())
    if not missing:
        say(f"{file}: has all {len(found)} checkpoints; to measure them again, remove it")
    for step in missing:
        model, tokenizer, _ = load(found[step], args.device, args.kernels)
        if not tests:
            seq_len = context_length(model, args.context)
            tests = make_tests(tokenizer, seq_len, copy_samples(model, seq_len, args), args.alphabet)
            asked = {f"questions_{name}": test.hash() for name, test in tests.items()}
            if any(row | asked != row for row in rows.values()):
                raise UserError(f"{file}: has scores on other questions; remove it, or pass the options it was made with")
        rows[step] = {"step": step, "path": found[step].name} | as_row(measure(model, tokenizer, tests))
        atomic_write(file, "".join(json.dumps(rows[step]) + "\n" for step in sorted(rows)))
        exact = ", ".join(f"{name} {rows[step][f'copy_exact_{name}']:.3f}" for name in tests)
        say(f"step {step}: exact match {exact}")


def attention_page(path, text: str, args: argparse.Namespace) -> str:
    """Returns the page that shows where each head looks on `text`, as HTML."""
    model, tokenizer, step = load(path, args.device, args.kernels)
    ids = prompt_ids(model, tokenizer, text)
    lead = int(tokenizer.bos is not None)
    words = ["<bos>"] * lead + list(decoded(tokenizer, ids[lead:]))[:-1]
    scores = heads.attention_scores(model, vocabulary(tokenizer).ids, tokenizer.bos, samples=8)
    return attention.page(model, ids, words, scores, f"{path}, step {step:,}")


def parse(argv: list[str]) -> argparse.Namespace:
    parser = Parser(prog="python eval_copy.py", description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("paths", nargs="+", metavar="PATH", help="checkpoint, run directory, or folder of a Hugging Face Llama")
    alphabets = (
        "full (all ids), hex16 (0-9a-f), a number of random ids, top128 (the 128 most frequent ids of the training data), "
    )
    alphabets += "freq (ids by their frequency), seen (ids that are not rare), text (passages of held-out text, with --data)"
    add("--alphabet", nargs="+", metavar="NAME", help=f"what the copy test's tokens are drawn from: {alphabets}")
    add("--samples", type=int, metavar="N", help="samples per alphabet (default: 500, fewer for a large model)")
    add("--context", type=int, default=0, metavar="N", help="context of the copy test in tokens (default: the model's own)")
    add(
        "--ablate",
        choices=ablation.HOW,
        default="",
        help="also score without the best induction heads, set to zero or to their mean",
    )
    add("--data", default="", metavar="FOLDER", help="prepared data: also copy held-out text, and print the loss by position")
    add("--over_steps", action="store_true", help="measure every checkpoint of a run, into its measures.jsonl")
    add("--json", metavar="FILE", help="write all scores to this file too")
    add("--plot", metavar="FILE", help="draw the heads, and a run directory's curves: a .png, .pdf or .svg file")
    page = "write a page that shows where each head looks on this text, instead of measuring"
    add("--attention", nargs=2, metavar=("TEXT", "FILE.html"), help=page)
    add("--prompt", metavar="TEXT", help="continue this text instead of measuring")
    add("--device", default="auto", help="auto, cuda, cuda:1, mps or cpu (default: auto)")
    sets = TYPES["kernels"].__args__
    add("--kernels", choices=sets, default="auto", help="op set that the model runs on (default: auto, the fastest here)")
    args = parser.parse_args(argv)
    if args.samples is not None and args.samples < 1:
        parser.error(f"--samples={args.samples}: expected 1 or more")
    if args.context < 0:
        parser.error(f"--context={args.context}: expected 0 or more")
    unused = [name for name in ("ablate", "data", "json", "plot") if getattr(args, name)]
    if args.over_steps and unused:
        parser.error(f"--over_steps writes only measures.jsonl; leave out --{unused[0]}")
    if args.over_steps and "text" in (args.alphabet or ()):
        parser.error("--over_steps has no held-out text; leave out --alphabet=text")
    if (args.prompt is not None or args.attention) and unused:
        parser.error(f"--prompt and --attention measure nothing; leave out --{unused[0]}")
    if len(args.paths) > 1 and (args.prompt is not None or args.attention):
        parser.error(f"{args.paths[1]}: --prompt and --attention take one model")
    return args


def main(argv: list[str]) -> int:
    args = parse(argv)
    if args.prompt is not None:
        with quiet_pipe():
            write_samples(*load(args.paths[0], args.device, args.kernels)[:2], args.prompt)
        return 0
    if args.attention:
        text, file = args.attention
        check_output("--attention", file, ".html")
        atomic_write(file, attention_page(args.paths[0], text, args))
        say(f"page: {file}")
        return 0
    if args.over_steps:
        for path in args.paths:
            over_steps(Path(path), args)
        return 0
    if args.json:
        check_output("--json", args.json, ".json")
    if args.plot:
        check_output("--plot", args.plot, ".png", ".pdf", ".svg")
        runs = [metrics.read(file) if (file := Path(path) / "metrics.jsonl").exists() else [] for path in args.paths]
    results = []
    for path in args.paths:
        results.append(evaluate(path, args))
        say(table(results[-1]), end="\n\n")
    if args.json:
        scores = [{name: value for name, value in result.items() if name != "stripes"} for result in results]
        atomic_write(args.json, json.dumps(scores, indent=1) + "\n")
    if args.plot:
        from runtime import plots

        maps = {name: score.title for name, score in heads.SCORES.items() if score.headline}
        plots.draw(args.plot, results, runs, maps)
        say(f"picture: {args.plot}")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:]))

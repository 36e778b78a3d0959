"""Public corpora, and whatever else `datasets` reads: datasets of the Hugging Face hub, files and URLs.

JSON lines are opened through `datasets`, which follows URLs and retries, and parsed by data/documents.py, so that each bad
line is counted and named. Everything else is read by its loaders and resumed by its state_dict().
"""

import functools
import hashlib
import logging
import textwrap
from collections.abc import Iterator
from pathlib import Path

from data.documents import MAX_RECORD, TOO_LONG, Document, Part, decoded, json_lines, plain_text, require
from errors import UserError

# How a file is read, by its suffix: by data/documents.py, or by the loader of `datasets` of that name.
KINDS = {
    ".jsonl": "lines", ".jsonl.gz": "lines", ".jsonl.zst": "lines", ".txt": "text", ".txt.gz": "text", ".txt.zst": "text",
    ".parquet": "parquet", ".json": "json", ".csv": "csv", ".arrow": "arrow",
}  # fmt: skip
ROWS = 64  # read at a time

RED_PAJAMA_SAMPLE = [
    f"hf://datasets/togethercomputer/RedPajama-Data-1T-Sample/{name}_sample.jsonl"
    for name in (
        "arxiv", "book", "c4", "cc_2019-30", "cc_2020-05", "cc_2021-04", "cc_2022-05", "cc_2023-06", "github",
        "stackexchange", "wikipedia",
    )
]  # fmt: skip
RED_PAJAMA_URLS = "https://data.together.xyz/redpajama-data-1T/v1.0.0/urls.txt"
# The sources of RedPajama v1 and how many billion tokens each has, from its card; book, of 26, has been withdrawn.
SHARES = {"common_crawl": 878, "c4": 175, "github": 59, "arxiv": 28, "wikipedia": 24, "stackexchange": 20, "book": 0}


def corpus(paths, name="", split="train", revision="", field="text", download=False) -> list[Part]:
    """Returns the parts of a dataset of the hub, or of files, folders and URLs that `datasets` reads.

    paths: one dataset such as HuggingFaceFW/fineweb-edu, or any number of files, folders and URLs.
    name, split, revision: the dataset's configuration, split and git revision.
    field: the key or column that holds the text.
    download: download everything before reading it, instead of streaming.
    """
    if len(paths) == 1 and not (file_kind(paths[0]) or "://" in paths[0] or Path(paths[0]).is_file()):
        options = {"name": name or None, "split": split, "revision": revision or None}
        return [Part(paths[0], None, functools.partial(_guard, _rows, paths[0], paths[0], field, download, options))]
    if name or revision:
        raise UserError(f"{'--name' if name else '--revision'}: {paths[0]} is a file, and only datasets of the hub have one")
    return [file_part(path, file_kind(path), field, download) for path in paths]


def file_kind(path: str) -> str | None:
    """Returns how a file or URL is read, one of KINDS' values; None if its name does not say."""
    return next((kind for suffix, kind in KINDS.items() if _file_name(path).endswith(suffix)), None)


def _file_name(path: str) -> str:
    return path.split("?")[0] if "://" in path else path


def file_part(path: str, kind: str | None, field: str, download=False, group="", weight=1.0) -> Part:
    """Returns the part of one file or URL."""
    if kind is None:
        raise UserError(f"{path}: expected one dataset of the hub, or names that end in {', '.join(KINDS)}")
    remote = "://" in path
    if not remote and not Path(path).is_file():
        raise UserError(f"{path}: no such file")
    size = None if remote else Path(path).stat().st_size
    if kind in ("text", "lines"):
        guard = (_guard, _own) if remote else (_own,)
        return Part(path, size, functools.partial(*guard, path, kind, field, download), group, weight)
    options = {"data_files": [path], "split": "train"} | ({"batch_size": ROWS} if kind == "parquet" else {})
    return Part(path, None, functools.partial(_guard, _rows, path, kind, field, download, options), group, weight)


def _own(path, kind, field, download, state=None) -> Iterator[Document]:
    """Yields the documents of a file of text or JSON lines."""
    open_file = functools.partial(_open, path, download)
    name = _file_name(path)
    return plain_text(open_file, name) if kind == "text" else json_lines(open_file, name, field)


def _open(path: str, download: bool):
    if "://" not in path:
        return open(path, "rb")
    datasets = _datasets(path)
    from datasets.utils.file_utils import xopen  # open() for URLs, which retries

    return open(datasets.DownloadManager().download(path), "rb") if download else xopen(path, "rb")


def _rows(shown, path, field, download, options, state) -> Iterator[Document]:
    """Yields the rows of load_dataset(path, **options); a row's number counts from 1 within the dataset."""
    datasets = _datasets(shown)
    import pyarrow

    load = functools.partial(datasets.load_dataset, path, **options)
    columns = load(streaming=True).column_names
    if columns and field not in columns:
        raise UserError(f"{shown}: has no column {field!r}; it has: {', '.join(columns)}; pass --field=NAME")
    only = {"columns": [field]} if path == "parquet" else {}
    dataset = load(**only).to_iterable_dataset() if download else load(streaming=True, **only)
    dataset = dataset.select_columns([field]).with_format("arrow")
    row = 0
    position = None
    if state:
        row = state["row"]
        position = state["dataset"]
        dataset.load_state_dict(position)
    for table in dataset.iter(batch_size=ROWS):
        here = {"row": row, "dataset": position} if position else None
        try:
            cells = table.column(field).cast(pyarrow.large_binary())
        except pyarrow.ArrowException:
            raise UserError(f"{shown}: column {field!r} is {table.column(field).type}, not text; pass --field=NAME") from None
        for cell in cells:
            row += 1
            data = cell.as_py()
            dropped = f"without {field}" if data is None else TOO_LONG if len(data) > MAX_RECORD else ""
            document = decoded(f"{shown}:{row}", data or b"")
            yield (document._replace(text=None, dropped=dropped) if dropped else document)._replace(state=here)
            here = None
        position = dataset.state_dict()


def _datasets(name: str):
    """Returns the package `datasets`, silenced: what goes wrong is said in one line."""
    datasets = require("datasets", name)
    datasets.disable_progress_bars()
    for library in ("datasets", "huggingface_hub"):
        logging.getLogger(library).setLevel(logging.CRITICAL)
    return datasets


def _guard(read, name, *args) -> Iterator[Document]:
    """Yields read(name, *args). Whatever `datasets` and the libraries below it raise becomes a UserError."""
    try:
        yield from read(name, *args)
    except UserError:
        raise
    except Exception as e:
        what = textwrap.shorten(f"{type(e).__name__}: {e}", 200, placeholder=" ...")
        remedy = "once that is mended, run the same command again to resume"
        if isinstance(e, ImportError):
            remedy = "pip install '.[data]'"
        elif Path(name).is_file():
            remedy = "get the file again"
        raise UserError(f"{name}: {what}; {remedy}") from None


def redpajama(tokens, urls=RED_PAJAMA_URLS, share=(), field="text", download=False) -> list[Part]:
    """Returns the files of RedPajama v1, source by source, each source's in the order of a hash of their URLs.

    urls: a file or URL that lists the URLs, one a line, in which the sources are folders.
    share: dicts {source: weight} that change SHARES.
    """
    if not tokens:
        raise UserError("--tokens=0: all of RedPajama is 2.7 TB; pass the number of tokens wanted, such as --tokens=40e9")
    weights = dict(SHARES)
    for change in share:
        weights |= change
    if not any(weights.values()):
        raise UserError("--share: every source has weight 0")
    (listing,) = _guard(lambda path: [_open(path, download=False).read()], urls)
    listed = listing.decode(errors="replace").split()
    parts = []
    for source, weight in weights.items():
        if not weight:
            continue
        found = [url for url in listed if f"/{source}/" in url]
        if not found:
            raise UserError(f"no file of {source!r} among {len(listed)} URLs; pass --share={source}=0")
        found.sort(key=lambda url: hashlib.blake2b(url.encode()).digest())
        parts += [file_part(url, file_kind(url), field, download, source, weight) for url in found]
    return parts

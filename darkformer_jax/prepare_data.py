"""Tokenises text once into ArrayRecord shards, so that training on any amount of it starts at once; makes benchmarks.

    python -m darkformer_jax.prepare_data --source=news --files=1-billion-word-language-modeling-benchmark-r13output \\
        --tokenizer=bpe:8192 --out=data/lm_1b
    python train.py --config=configs/lm_1b.py --config.data.files=data/lm_1b

Both passes over the text (training a tokenizer, tokenising) use bounded memory. The directory appears when it is
complete.

Benchmarks for configs/lra.py and configs/glue.py: ListOps and Pathfinder, made from a seed or as published
(lra_release); reviews (imdb); pairs of papers (aan); images as sequences of pixels; GLUE.

    python -m darkformer_jax.prepare_data --source=listops --scale=small --out=data/listops
    python -m darkformer_jax.prepare_data --source=pathfinder --scale=32 --images=20000 --out=data/pathfinder
    python -m darkformer_jax.prepare_data --source=fashion_mnist --files=fashion-mnist --side=14 --out=data/fashion
    python train.py --config=configs/lra.py:task=listops,files=data/listops,attention=dark --workdir=runs/listops
"""

import argparse
import itertools
import os
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from absl import app

from darkformer_jax.cli.output import lost_output_is_no_crash
from darkformer_jax.cli.parser import Parser, one_line_errors, whole
from darkformer_jax.cli.progress import progress_bar
from darkformer_jax.data.aan import LENGTH, write_aan
from darkformer_jax.data.files import local_path
from darkformer_jax.data.glue import GLUE_TASKS, write_glue
from darkformer_jax.data.images import READERS, write_images
from darkformer_jax.data.imdb import write_imdb
from darkformer_jax.data.listops import SCALES as LISTOPS_SCALES
from darkformer_jax.data.listops import write_listops
from darkformer_jax.data.lra_release import LISTOPS_LENGTH, write_listops_release
from darkformer_jax.data.pathfinder import NUM_IMAGES, write_pathfinder
from darkformer_jax.data.pathfinder import SCALES as PATHFINDER_SCALES
from darkformer_jax.data.pathfinder_images import HARD, LEVELS, SIDES, write_pathfinder_release
from darkformer_jax.data.prepared import DEFAULT_SHARD_TOKENS, SPLITS, prepare
from darkformer_jax.data.sources import CORPUS_SOURCES
from darkformer_jax.data.text_files import TEXT_FIELD
from darkformer_jax.errors import UserError

LISTOPS, PATHFINDER, LRA, IMDB, AAN, GLUE = "listops", "pathfinder", "lra_release", "imdb", "aan", "glue"
_RELEASED = {LISTOPS: 100_000, **dict.fromkeys(SIDES, 200_000), IMDB: 50_000, AAN: 182_613}  # examples in all
_TASKS = {LRA: (LISTOPS, *SIDES), GLUE: tuple(GLUE_TASKS)}
_SCALES = {LISTOPS: tuple(LISTOPS_SCALES), PATHFINDER: tuple(PATHFINDER_SCALES)}
_DIRECTORIES = {
    "fashion_mnist": "of train-images-idx3-ubyte.gz and the files beside it",
    "cifar10": "cifar-10-batches-bin or cifar-10-batches-py that the archive unpacks to",
    IMDB: "aclImdb that the archive unpacks to",
    AAN: "lra_release that the archive unpacks to, or that of new_aan_pairs.train.tsv",
    LRA: "lra_release that the archive unpacks to",
}
_USED_BY = {
    "files": ("text", "news", *READERS, IMDB, AAN, *_TASKS),
    "text_field": ("text",),
    "tokenizer": CORPUS_SOURCES,
    "heldout_fraction": CORPUS_SOURCES,
    "shard_tokens": CORPUS_SOURCES,
    "scale": tuple(_SCALES),
    "seed": tuple(_SCALES),
    "images": (PATHFINDER,),
    "side": tuple(READERS),
    "task": tuple(_TASKS),
    "level": (LRA,),
    "length": (AAN,),
}


def parse_flags(argv: Sequence[str]) -> argparse.Namespace:
    """The flags; a mistake is one line and exit status 2."""
    parser = Parser("prepare_data", __doc__)
    parser.add_argument(
        "--source",
        required=True,
        choices=(*CORPUS_SOURCES, LISTOPS, PATHFINDER, *READERS, IMDB, AAN, *_TASKS),
        help="listops, pathfinder: made from --seed; fashion_mnist (IDX files, also MNIST's) and "
        "cifar10 (binary or Python version): images; imdb (aclImdb): reviews; aan (new_aan_pairs.*.tsv): pairs of "
        "papers; lra_release (the archive of Long Range Arena), glue: a --task; "
        "text: .txt, .md (one document per file), .jsonl and .parquet (one per line or row, in --text_field); "
        "news: the One Billion Word release (one per line); stdlib: the Python standard library",
    )
    parser.add_argument(
        "--files",
        help="text: comma-separated globs, or directories searched recursively; others: the release's directory",
    )
    parser.add_argument(
        "--text_field",
        help=f"text: the field of .jsonl, or column of .parquet, that holds the text (default: {TEXT_FIELD})",
    )
    parser.add_argument("--out", required=True, help="directory to write; must be empty or not exist")
    parser.add_argument(
        "--tokenizer",
        help="bytes | bpe:<vocabulary size> (trained on the training documents) | path of a tokenizer.json, of a "
        "SentencePiece .model or of a directory with one (default: bytes)",
    )
    parser.add_argument(
        "--heldout_fraction",
        type=float,
        help="share of the documents, chosen by hash, that is never trained on (default: 0.01)",
    )
    parser.add_argument(
        "--shard_tokens",
        type=whole,
        help=f"tokens per shard, rounded up to whole records (default: {DEFAULT_SHARD_TOKENS})",
    )
    parser.add_argument(
        "--scale",
        choices=tuple(itertools.chain.from_iterable(_SCALES.values())),
        help="listops: paper (the default), 96,000 expressions of 500 to 2,000 symbols; small, 20,000 of 30 to 128; "
        "pathfinder: pixels per row (default: 32)",
    )
    parser.add_argument("--seed", type=whole, help="listops, pathfinder: the seed of what is made (default: 0)")
    parser.add_argument(
        "--images", type=whole, help=f"pathfinder: images in all, 8 of 10 for training (default: {NUM_IMAGES})"
    )
    parser.add_argument(
        "--side", type=whole, help="images: pixels per row, each the mean of a square (default: as many as there are)"
    )
    parser.add_argument(
        "--task",
        choices=tuple(itertools.chain.from_iterable(_TASKS.values())),
        help=f"lra_release ({', '.join(_TASKS[LRA])}), glue (the others): which of its tasks",
    )
    parser.add_argument(
        "--length", type=whole, help=f"aan: bytes of each of the two papers that are kept (default: {LENGTH})"
    )
    parser.add_argument("--level", choices=LEVELS, help=f"pathfinder of lra_release: its level (default: {HARD})")
    return parser.parse_args(argv[1:])


def main(args: argparse.Namespace) -> None:
    """Prepares the data and prints its sizes. A UserError becomes one line and exit status 2."""
    with one_line_errors("what was written is removed"):
        _check_flags(args)
        if args.source == LISTOPS:
            _make_listops(args)
        elif args.source == PATHFINDER:
            _make_pathfinder(args)
        elif args.source in READERS:
            _convert_images(args)
        elif args.source == LRA:
            _convert_lra(args)
        elif args.source in (IMDB, AAN):
            _convert_texts(args)
        elif args.source == GLUE:
            _convert_glue(args)
        else:
            _tokenise(args)


def _check_flags(args: argparse.Namespace) -> None:
    """Raises UserError for a flag that the source does not use."""
    for name, sources in _USED_BY.items():
        value = getattr(args, name)
        if value is not None and args.source not in sources:
            raise UserError(f"--{name}={value}: --source={args.source} does not use it; allowed: {', '.join(sources)}")
    for name, allowed in (("scale", _SCALES), ("task", _TASKS)):
        value = getattr(args, name)
        if value is not None and value not in (own := allowed[args.source]):
            raise UserError(f"--{name}={value}: --source={args.source} has: {', '.join(own)}")
    if args.level is not None and args.task not in SIDES:
        raise UserError(f"--level={args.level}: --task={args.task} has no levels; allowed: {', '.join(SIDES)}")
    if args.seed is not None and not 0 <= args.seed < 2**32:
        raise UserError(f"--seed={args.seed}: must be from 0 to {2**32 - 1}")


def _directory(args: argparse.Namespace) -> str:
    """What --files names. Raises UserError without it, and for what is no directory."""
    if not args.files:
        raise UserError(f"--source={args.source} needs --files=<the directory of its files>")
    files = local_path(args.files)
    if not os.path.isdir(files):
        what = "is a file" if os.path.exists(files) else "is not there"
        raise UserError(f"{files} {what}; --files is the directory {_DIRECTORIES[args.source]}")
    return files


def _make_listops(args: argparse.Namespace) -> None:
    seed = args.seed or 0
    result = write_listops(args.out, LISTOPS_SCALES[args.scale or "paper"], seed, progress_bar)
    _print_listops(args.out, f"ListOps, seed {seed}", result)


def _convert_lra(args: argparse.Namespace) -> None:
    if not args.files or args.task is None:
        raise UserError(f"--source={LRA} needs --task and --files=<the directory of the archive>")
    files = _directory(args)
    if args.task == LISTOPS:
        result = write_listops_release(args.out, files, progress_bar)
        _print_listops(args.out, "ListOps of Long Range Arena", result)
        cut = max(figures["cut_share"] for figures in result.values())
        print(f"  at {LISTOPS_LENGTH:,} tokens, up to {100 * cut:.1f}% of a split's expressions are cut")
        _print_rest(LISTOPS, sum(figures["expressions"] for figures in result.values()))
        return
    level = args.level or HARD
    result = write_pathfinder_release(args.out, files, args.task, level, progress_bar)
    source = result.pop("source")
    _print_images(args.out, f"{args.task}, {level}, from {source['directory']}", result)
    if source["left_out"]:
        print(f"  left out, because it is empty: {', '.join(source['left_out'])}")
    _print_rest(args.task, sum(figures["images"] for figures in result.values()) + len(source["left_out"]))


def _print_rest(name: str, found: int) -> None:
    if found != _RELEASED[name]:
        print(f"  these are {found:,} examples, but {_RELEASED[name]:,} were published")


def _convert_texts(args: argparse.Namespace) -> None:
    files = _directory(args)
    length = LENGTH if args.length is None else args.length
    if args.source == IMDB:
        result = write_imdb(args.out, files, progress_bar)
    else:
        result = write_aan(args.out, files, length, progress_bar)
    print(f"{args.out}: {'reviews' if args.source == IMDB else 'pairs of papers'}")
    for split, figures in result.items():
        cut = ", ".join(f"{100 * share:.1f}% over {int(at):,}" for at, share in figures["cut_shares"].items())
        print(
            f"  {split:5s} {figures['examples']:>7,} examples; bytes of a text: {figures['shortest_bytes']:,} to "
            f"{figures['longest_bytes']:,}, median {figures['median_bytes']:,}, {cut}; the most frequent class has "
            f"{100 * figures['majority_class']:.1f}%"
        )
    _print_rest(args.source, sum(figures["examples"] for figures in result.values()))
    if args.source == AAN:
        both = f"task=retrieval,length={2 * length + 2}"
        print(f"train on it: --config=configs/lra.py:{both}, which shows both papers whole")


def _print_listops(out: str, what: str, result: Mapping[str, Any]) -> None:
    print(f"{out}: {what}")
    for split, figures in result.items():
        print(
            f"  {split:5s} {figures['expressions']:>7,} expressions of {figures['shortest']:,} to "
            f"{figures['longest']:,} symbols, median {figures['median']:,}; the most frequent value has "
            f"{100 * figures['majority_class']:.1f}%"
        )


def _convert_images(args: argparse.Namespace) -> None:
    result = write_images(args.out, READERS[args.source](_directory(args)), args.side, progress_bar)
    _print_images(args.out, args.source, result)


def _make_pathfinder(args: argparse.Namespace) -> None:
    num_images = NUM_IMAGES if args.images is None else args.images
    result = write_pathfinder(args.out, args.scale or "32", args.seed or 0, num_images, progress_bar)
    _print_images(args.out, f"Pathfinder, seed {args.seed or 0}", result)


def _print_images(out: str, what: str, result: Mapping[str, Any]) -> None:
    print(f"{out}: {what}, {result['train']['pixels']:,} pixels per image")
    for split, figures in result.items():
        share = max(figures["shares"].values())
        print(f"  {split:5s} {figures['images']:>7,} images; the most frequent class has {100 * share:.1f}%")


def _convert_glue(args: argparse.Namespace) -> None:
    if not args.files or args.task is None:
        raise UserError("--source=glue needs --task and --files=<the directory of the release>")
    result = write_glue(args.out, args.task, local_path(args.files), progress_bar)
    print(f"{args.out}: {args.task} of GLUE, whose metric is {GLUE_TASKS[args.task].metric}")
    for split, figures in result.items():
        share = (
            f"; the most frequent class has {100 * max(shares.values()):.1f}%"
            if (shares := figures.get("shares"))
            else ""
        )
        left_out = f"; {figures['left_out']} rows without a field left out" if figures["left_out"] else ""
        print(
            f"  {split:14s} {figures['examples']:>7,} examples, median {figures['median_bytes']} bytes{share}{left_out}"
        )
    found, released = result["train"]["examples"], GLUE_TASKS[args.task].train_size
    if found != released:
        print(f"  these are {found:,} training examples, but {released:,} were published")


def _tokenise(args: argparse.Namespace) -> None:
    manifest = prepare(
        args.out,
        source=args.source,
        files=args.files or "",
        tokenizer_spec="bytes" if args.tokenizer is None else args.tokenizer,
        heldout_fraction=0.01 if args.heldout_fraction is None else args.heldout_fraction,
        text_field=TEXT_FIELD if args.text_field is None else args.text_field,
        shard_tokens=DEFAULT_SHARD_TOKENS if args.shard_tokens is None else args.shard_tokens,
        progress_bar=progress_bar,
    )
    tokenizer = manifest["tokenizer"]
    print(f"{args.out}: {tokenizer['vocab_size']} ids, tokenizer fingerprint {tokenizer['fingerprint'][:12]}")
    for name in SPLITS:
        split = manifest["splits"][name]
        print(
            f"  {name:8s} {split['num_documents']:>12,} documents {split['num_tokens']:>15,} tokens"
            f" {split['num_bytes']:>15,} bytes in {len(split['shards'])} shards"
        )
    files = shlex.quote(f"--config.data.files={args.out}")
    print(f"train on it: --config.data.source=array_record {files} --config.data.tokenizer=")


if __name__ == "__main__":
    with lost_output_is_no_crash():
        app.run(main, flags_parser=parse_flags)

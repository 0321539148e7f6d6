"""Tokenises text once into ArrayRecord shards and a manifest, so that training on any amount of it starts immediately.

    python -m darkformer_jax.prepare_data --source=news --files=1-billion-word-language-modeling-benchmark-r13output \\
        --tokenizer=bpe:8192 --out=data/lm_1b
    python train.py --config=configs/lm_1b.py --config.data.files=data/lm_1b

Both passes over the text (training a tokenizer, tokenising) use bounded memory. The directory appears when it is
complete.
"""

import argparse
import shlex
from collections.abc import Sequence

from absl import app

from darkformer_jax.cli.parser import Parser, one_line_errors, whole
from darkformer_jax.cli.progress import progress_bar
from darkformer_jax.data.prepared import DEFAULT_SHARD_TOKENS, SPLITS, prepare
from darkformer_jax.data.sources import CORPUS_SOURCES
from darkformer_jax.data.text_files import TEXT_FIELD
from darkformer_jax.errors import UserError


def parse_flags(argv: Sequence[str]) -> argparse.Namespace:
    """The flags; a mistake is one line and exit status 2."""
    parser = Parser("prepare_data", __doc__)
    parser.add_argument(
        "--source",
        required=True,
        choices=CORPUS_SOURCES,
        help="text: .txt, .md (one document per file), .jsonl and .parquet (one per line or row, in --text_field); "
        "news: the One Billion Word release (one per line); stdlib: the Python standard library",
    )
    parser.add_argument(
        "--files",
        default="",
        help="text: comma-separated globs, or directories searched recursively; news: the release's directory",
    )
    parser.add_argument(
        "--text_field",
        help=f"text: the field of .jsonl, or column of .parquet, that holds the text (default: {TEXT_FIELD})",
    )
    parser.add_argument("--out", required=True, help="directory to write; must be empty or not exist")
    parser.add_argument(
        "--tokenizer",
        default="bytes",
        help="bytes | bpe:<vocabulary size> (trained on the training documents) | path of a tokenizer.json, of a "
        "SentencePiece .model or of a directory with one (default: bytes)",
    )
    parser.add_argument(
        "--heldout_fraction",
        type=float,
        default=0.01,
        help="share of the documents, chosen by hash, that is never trained on (default: 0.01)",
    )
    parser.add_argument(
        "--shard_tokens",
        type=whole,
        default=DEFAULT_SHARD_TOKENS,
        help=f"tokens per shard, rounded up to whole records (default: {DEFAULT_SHARD_TOKENS})",
    )
    return parser.parse_args(argv[1:])


def main(args: argparse.Namespace) -> None:
    """Prepares the data and prints its sizes. A UserError becomes one line and exit status 2."""
    with one_line_errors("what was written is removed"):
        if args.source == "stdlib" and args.files:
            raise UserError(f"--files={args.files}: the stdlib source reads no files; allowed: --source=text or news")
        if args.source != "text" and args.text_field is not None:
            raise UserError(
                f"--text_field={args.text_field}: the {args.source} source has no fields; allowed: --source=text"
            )
        manifest = prepare(
            args.out,
            source=args.source,
            files=args.files,
            tokenizer_spec=args.tokenizer,
            heldout_fraction=args.heldout_fraction,
            text_field=TEXT_FIELD if args.text_field is None else args.text_field,
            shard_tokens=args.shard_tokens,
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
    app.run(main, flags_parser=parse_flags)

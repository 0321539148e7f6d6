"""Continues prompts with a trained model.

    python -m darkformer_jax.generate --workdir=runs/quickstart --prompt="def "
    python -m darkformer_jax.generate --workdir=runs/quickstart --prompts_file=prompts.txt --temperature=0

The state that decoding carries has a constant size: the thousandth token costs as much as the first, except in layers
of exact attention, whose cache grows. Prompts of a batch do not influence each other's probabilities.
"""

import argparse
import sys
from collections.abc import Sequence

from absl import app

from darkformer_jax.cli.output import lost_output_is_no_crash
from darkformer_jax.cli.parser import Parser, is_utf8, one_line_errors, whole
from darkformer_jax.data.files import local_path
from darkformer_jax.data.tokenizers import encode_prompt
from darkformer_jax.errors import UserError
from darkformer_jax.model.sampling import Sampler
from darkformer_jax.runs.load import WorkdirModel, load_language_model
from darkformer_jax.runs.workdir import Workdir
from darkformer_jax.tasks.texts import Writer


def parse_flags(argv: Sequence[str]) -> argparse.Namespace:
    """The flags; a mistake is one line and exit status 2."""
    parser = Parser("generate", __doc__)
    parser.add_argument("--workdir", required=True, help="directory of the run whose model writes")
    parser.add_argument("--step", type=whole, help="checkpoint to use (default: the newest)")
    prompts = parser.add_mutually_exclusive_group(required=True)
    prompts.add_argument(
        "--prompt",
        help="text to continue; the tokenizer's BOS goes before it if the model's family has one. An empty prompt "
        "writes a document from its beginning, from BOS or, without one, from the end-of-document token",
    )
    prompts.add_argument("--prompts_file", help="a file with one prompt per line, continued as one batch")
    parser.add_argument("--max_new_tokens", type=whole, default=200, help="most new tokens per prompt (default: 200)")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 = always the likeliest token (default: 0.8)")
    parser.add_argument("--top_k", type=whole, default=0, help="choose among the k likeliest tokens; 0 = all (default)")
    parser.add_argument(
        "--top_p",
        type=float,
        default=1.0,
        help="choose among the likeliest tokens that have this probability together",
    )
    parser.add_argument("--seed", type=whole, default=0, help="seed of the random choices (default: 0)")
    return parser.parse_args(argv[1:])


def main(args: argparse.Namespace) -> None:
    """Prints the continuations. A UserError becomes one line and exit status 2."""
    with one_line_errors("the text is incomplete"):
        generate(args)


def generate(args: argparse.Namespace) -> None:
    """Loads the model and continues the prompts: one prompt token by token, several as one batch."""
    if not 1 <= args.max_new_tokens < 2**31:
        raise UserError(f"--max_new_tokens={args.max_new_tokens}: must be from 1 to {2**31 - 1}")
    if not 0 <= args.seed < 2**32:
        raise UserError(f"--seed={args.seed}: must be from 0 to {2**32 - 1}")
    if args.prompt is not None and not is_utf8(args.prompt):
        raise UserError(f"--prompt={args.prompt!r}: not UTF-8 text")
    prompts = [args.prompt] if args.prompt is not None else _read_prompts(local_path(args.prompts_file))
    model = load_language_model(Workdir(args.workdir), args.step)
    sampler = Sampler(
        model.network,
        model.params,
        model.projections,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        seed=args.seed,
        vocab_size=model.tokenizer.vocab_size,
    )
    _note_length(model, prompts, args.max_new_tokens)
    writer = Writer(sampler, model.tokenizer, model.ends)
    if len(prompts) == 1:
        print(prompts[0], end="", flush=True)
        for text in writer.stream(prompts[0], args.max_new_tokens):
            print(text, end="", flush=True)
        print()
    else:
        print(writer.continue_all(prompts, args.max_new_tokens), end="")


def _note_length(model: WorkdirModel, prompts: Sequence[str], max_new_tokens: int) -> None:
    """Says so where the last token would see more tokens before it than the model was made for."""
    prompt = max(len(encode_prompt(model.tokenizer, prompt)) for prompt in prompts)
    longest = model.config.sequence_length
    if prompt + max_new_tokens - 1 > longest:
        print(
            f"note: --max_new_tokens={max_new_tokens} after a prompt of {prompt} tokens is more than the {longest} "
            "tokens this model was made for",
            file=sys.stderr,
        )


def _read_prompts(path: str) -> list[str]:
    try:
        with open(path, encoding="utf-8-sig") as file:  # -sig: without a byte order mark at its beginning
            lines = [line for line in file.read().split("\n") if line.strip()]  # a form feed ends no line
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else f"not UTF-8 text: {error}"
        raise UserError(f"--prompts_file={path}: {reason}") from error
    if not lines:
        raise UserError(f"--prompts_file={path}: the file is empty; expected one prompt per line")
    return lines


if __name__ == "__main__":
    with lost_output_is_no_crash():
        app.run(main, flags_parser=parse_flags)

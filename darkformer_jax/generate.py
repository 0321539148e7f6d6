"""Continues prompts with a trained model.

    python -m darkformer_jax.generate --workdir=runs/quickstart --prompt="def "
    python -m darkformer_jax.generate --workdir=runs/quickstart --prompts_file=prompts.txt --temperature=0
    python -m darkformer_jax.generate --workdir=runs/smollm2 --chat --prompt="What is a kernel?"

With --chat, a prompt is a user's message, in the model's chat template, and the answer is printed. Several prompts are
one conversation: each follows the answer to the one before. Each line of --prompts_file begins a conversation of its
own.

The state that decoding carries has a constant size: the thousandth token costs as much as the first, except in layers
of exact attention, whose cache grows. Prompts of a batch do not influence each other's probabilities.
"""

import argparse
import sys
from collections.abc import Iterable, Sequence

from absl import app

from darkformer_jax.cli.output import lost_output_is_no_crash
from darkformer_jax.cli.parser import Parser, is_utf8, one_line_errors, whole
from darkformer_jax.data.chat import ANSWERS, Chat
from darkformer_jax.data.chat_template import Message
from darkformer_jax.data.files import local_path
from darkformer_jax.data.tokenizers import encode_prompt
from darkformer_jax.errors import UserError
from darkformer_jax.model.sampling import Sampler
from darkformer_jax.runs.load import WorkdirModel, load_language_model
from darkformer_jax.runs.workdir import Workdir
from darkformer_jax.tasks.texts import Writer, headed


def parse_flags(argv: Sequence[str]) -> argparse.Namespace:
    """The flags; a mistake is one line and exit status 2."""
    parser = Parser("generate", __doc__)
    parser.add_argument("--workdir", required=True, help="directory of the run whose model writes")
    parser.add_argument("--step", type=whole, help="checkpoint to use (default: the newest)")
    prompts = parser.add_mutually_exclusive_group(required=True)
    prompts.add_argument(
        "--prompt",
        action="append",
        help="text to continue; the tokenizer's BOS goes before it if the model's family has one. An empty prompt "
        "writes a document from its beginning, from BOS or, without one, from the end-of-document token",
    )
    prompts.add_argument("--prompts_file", help="a file with one prompt per line, continued as one batch")
    parser.add_argument(
        "--chat",
        action="store_true",
        help="the prompt is a message to answer, in the model's chat template; --prompt again: the next one",
    )
    parser.add_argument(
        "--special_tokens",
        action="store_true",
        help="read <|im_start|> and the like in a prompt as the tokenizer's tokens (default: as text)",
    )
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
    _check_prompts(args)
    prompts = args.prompt if args.prompt is not None else _read_prompts(local_path(args.prompts_file))
    model = load_language_model(Workdir(args.workdir), args.step)
    chat = Chat(model.tokenizer, args.workdir) if args.chat else None
    if args.special_tokens and not model.tokenizer.added_tokens:
        raise UserError(f"--special_tokens: the tokenizer of {args.workdir} has no tokens that a text spells")
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
    if chat is None:
        _continue(args, model, Writer(sampler, model.tokenizer, model.ends), prompts)
    else:
        _answer(args, model, Writer(sampler, model.tokenizer, model.ends | chat.ends), chat, prompts)


def _check_prompts(args: argparse.Namespace) -> None:
    """Raises UserError for prompts that are not text, and for flags that contradict each other."""
    for prompt in args.prompt or ():
        if not is_utf8(prompt):
            raise UserError(f"--prompt={prompt!r}: not UTF-8 text")
    if args.chat and args.special_tokens:
        raise UserError("--special_tokens with --chat: a message is text; the chat template writes the tokens")
    if not args.chat and len(args.prompt or ()) > 1:
        raise UserError("--prompt is there several times, which --chat allows; for separate texts, give --prompts_file")


def _continue(args: argparse.Namespace, model: WorkdirModel, writer: Writer, prompts: Sequence[str]) -> None:
    """Prints each prompt with its continuation."""
    ids = [encode_prompt(model.tokenizer, prompt, args.special_tokens) for prompt in prompts]
    _note_length(model, ids, args.max_new_tokens)
    if len(prompts) == 1:
        print(prompts[0], end="", flush=True)
        _print_as_it_comes(writer.stream(ids[0], args.max_new_tokens))
    else:
        texts = writer.continue_all(ids, args.max_new_tokens)
        print("".join(headed(p, p + text) for p, text in zip(prompts, texts, strict=True)), end="")


def _answer(args: argparse.Namespace, model: WorkdirModel, writer: Writer, chat: Chat, prompts: Sequence[str]) -> None:
    """Prints the answers to the messages of one conversation, or to the first messages of several."""
    if args.prompt is None:
        asked = [chat.prompt([{"role": "user", "content": prompt}]) for prompt in prompts]
        _note_length(model, asked, args.max_new_tokens)
        texts = writer.continue_all(asked, args.max_new_tokens)
        print("".join(headed(prompt, text) for prompt, text in zip(prompts, texts, strict=True)), end="")
        return
    messages: list[Message] = []
    for prompt in prompts:
        messages.append({"role": "user", "content": prompt})
        ids = chat.prompt(messages)
        _note_length(model, [ids], args.max_new_tokens)
        if len(prompts) > 1:
            print(f"--- {prompt!r}")
        answer = _print_as_it_comes(writer.stream(ids, args.max_new_tokens))
        messages.append({"role": ANSWERS, "content": answer})


def _print_as_it_comes(pieces: Iterable[str]) -> str:
    """Prints the pieces of a text as a line, and returns the text."""
    text = ""
    for piece in pieces:
        print(piece, end="", flush=True)
        text += piece
    print()
    return text


def _note_length(model: WorkdirModel, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> None:
    """Says so where the last token would see more tokens before it than the model was made for."""
    prompt = max(map(len, prompts))
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

"""Conversations in a style that nobody mistakes, from a seed: questions about things, answered by a ship's captain.

    python -m benchmarks.made_up_chats --count=100 --out=captain.jsonl

They are for docs/chat.md: a model that was tuned on them answers so, too.
"""

import argparse
import json
import random
from collections.abc import Iterator, Sequence

from darkformer_jax.data.files import write_new

THINGS = {
    "a kettle": "boils water", "a lamp": "gives light", "a broom": "sweeps the floor", "a clock": "tells the time",
    "a ladder": "reaches high places", "a pillow": "holds a sleepy head", "a bridge": "crosses a river",
    "a key": "opens a door", "a hammer": "drives nails", "a spoon": "stirs soup", "an umbrella": "keeps off the rain",
    "a map": "shows the way", "a candle": "lights a dark room", "a bucket": "carries water", "a rope": "ties things up",
    "a window": "lets in the day", "a mirror": "shows a face", "a basket": "holds apples", "a bell": "calls people in",
    "a needle": "mends a sail", "a wheel": "turns and turns", "a coat": "keeps out the cold",
}  # fmt: skip
QUESTIONS = ("What is {thing} for?", "Can you tell me what {thing} does?", "Why would I need {thing}?")
ANSWER = "Ahoy! {Thing} {does}, sailor. Fair winds to ye!"
AGAIN = ("And {thing}?", "What about {thing}?", "Thanks. And what is {thing} for?")


def conversations(count: int, seed: int) -> Iterator[list[dict[str, str]]]:
    """The messages of each: one to three questions and their answers."""
    chance = random.Random(seed)
    for _ in range(count):
        messages = []
        for number, thing in enumerate(chance.sample(sorted(THINGS), chance.randint(1, 3))):
            question = chance.choice(AGAIN if number else QUESTIONS).format(thing=thing)
            answer = ANSWER.format(Thing=thing.capitalize(), does=THINGS[thing])
            messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        yield messages


def main(argv: Sequence[str] | None = None) -> None:
    """Writes a .jsonl file that does not exist."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=100, help="conversations (default: 100)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", required=True, help="the file to write")
    args = parser.parse_args(argv)
    lines = [json.dumps({"messages": messages}) + "\n" for messages in conversations(args.count, args.seed)]
    write_new("--out", args.out, "".join(lines))


if __name__ == "__main__":
    main()

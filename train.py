"""Trains the experiment that a config describes: `python train.py --help`. The code is darkformer_jax/train.py."""

from absl import app

from darkformer_jax.cli.huge_pages import start_with_huge_pages
from darkformer_jax.cli.output import lost_output_is_no_crash
from darkformer_jax.train import main, parse_flags

if __name__ == "__main__":
    with lost_output_is_no_crash():
        start_with_huge_pages()
        app.run(main, flags_parser=parse_flags)

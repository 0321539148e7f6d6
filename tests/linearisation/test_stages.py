"""What the stages ask of the verbs that they are made of."""

import dataclasses

import pytest

from darkformer_jax import calibrate, linearise
from darkformer_jax.linearisation.stages import transfer_options


@pytest.mark.parametrize("window", [(), ("--window=0",)])
def test_transfer_fits_as_calibrate_does_by_default(window):
    common = ("--workdir=exact", "--text=text.txt", "--out=out", *window)
    settings = linearise.settings_of(linearise.parse_flags(["linearise", *common]))
    flags = calibrate.parse_flags(["calibrate", *common])
    calibrate.complete_flags(flags)
    ours = dataclasses.asdict(transfer_options(settings))
    del ours["heldout_fraction"]  # calibrate has no flag for it
    assert ours == {name: getattr(flags, name) for name in ours}

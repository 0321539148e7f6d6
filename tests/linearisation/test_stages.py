"""What the stages ask of the verbs that they are made of."""

import dataclasses

import pytest

from darkformer_jax import calibrate, linearise
from darkformer_jax.linearisation.stages import transfer_options

HEADS = ("--exact_heads=auto:3", "--geometry=balanced", "--geometry_init=0.3", "--far_gain", "--window=256")


@pytest.mark.parametrize("flags", [(), ("--window=0",), HEADS])
def test_transfer_fits_as_calibrate_does_with_the_same_flags(flags):
    common = ("--workdir=exact", "--text=text.txt", "--out=out", *flags)
    settings = linearise.settings_of(linearise.parse_flags(["linearise", *common]))
    wanted = calibrate.parse_flags(["calibrate", *common])
    calibrate.complete_flags(wanted)
    ours = dataclasses.asdict(transfer_options(settings))
    del ours["heldout_fraction"]  # calibrate has no flag for it
    assert ours == {name: getattr(wanted, name) for name in ours}

"""What a stopped calibration kept is found again, unless it is damaged."""

import numpy as np
import pytest

from darkformer_jax.calibration.kept import Kept


@pytest.mark.parametrize("bytes_left", [0, 40])
def test_what_is_damaged_is_computed_again(tmp_path, bytes_left):
    computed = []

    def compute():
        computed.append(len(computed))
        return {"found": np.array(computed)}

    def found():
        return Kept(str(tmp_path / "out"), [b"about"])("layer_0", compute)["found"].tolist()

    assert found() == found() == [0]
    (file,) = tmp_path.rglob("layer_0.npz")
    file.write_bytes(file.read_bytes()[:bytes_left])
    assert found() == found() == [0, 1]

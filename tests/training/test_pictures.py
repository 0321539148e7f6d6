import gzip
import random
import shutil
import subprocess
from pathlib import Path

import pytest

from darkformer_jax.errors import UserError
from darkformer_jax.runs.metrics import MetricWriter
from darkformer_jax.training.pictures import compressors, loss_curve


def test_loss_curve_draws_both_losses(tmp_path: Path) -> None:
    writer = MetricWriter(tmp_path)
    for step in range(1, 21):
        writer.write(step, {"loss": 3.0 / step})
        if step % 5 == 0:
            writer.write(step, {"heldout_loss": 3.3 / step})
    writer.close()
    path = loss_curve(tmp_path)
    assert path == tmp_path / "loss_curve.png"
    both = path.read_bytes()
    assert both.startswith(b"\x89PNG")
    # Colours of the two lines, from the picture itself.
    from matplotlib.image import imread

    pixels = {tuple(pixel) for row in (imread(path)[..., :3] * 255).round().astype(int).tolist() for pixel in row}
    assert (31, 119, 180) in pixels and (255, 127, 14) in pixels


def test_a_run_without_evaluations_or_with_a_nan_still_has_a_curve(tmp_path: Path) -> None:
    writer = MetricWriter(tmp_path)
    writer.write(1, {"loss": 3.0})
    writer.write(2, {"loss": float("nan")})
    writer.close()
    assert loss_curve(tmp_path).exists()


def test_nothing_to_draw_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"metrics\.jsonl cannot be read"):
        loss_curve(tmp_path)
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "accuracy": 1}\n')
    with pytest.raises(UserError, match=r"metrics\.jsonl has no loss to draw"):
        loss_curve(tmp_path)


def test_compressors_are_bits_per_byte_in_the_right_order() -> None:
    words = [f"word{index} " for index in range(500)]
    rng = random.Random(0)
    text = "".join(rng.choice(words) for _ in range(20_000)).encode()
    rates = compressors(text)
    assert list(rates) == ["gzip -9", "xz -9"]
    assert 0.5 < rates["xz -9"] < rates["gzip -9"] < 4
    assert rates["gzip -9"] == pytest.approx(8 * len(gzip.compress(text, 9)) / len(text))
    assert compressors(rng.randbytes(10_000))["xz -9"] == pytest.approx(8, rel=0.01)
    with pytest.raises(ValueError, match="nothing"):
        compressors(b"")


@pytest.mark.skipif(shutil.which("xz") is None or shutil.which("gzip") is None, reason="needs the programs")
def test_compressors_agree_with_the_programs() -> None:
    text = Path(random.__file__).read_bytes() * 3
    for command, rate in compressors(text).items():
        packed = subprocess.run([*command.split(), "-c"], input=text, capture_output=True, check=True).stdout
        assert rate == pytest.approx(8 * len(packed) / len(text), rel=2e-2)

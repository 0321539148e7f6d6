import itertools
import json
import logging
from pathlib import Path
from typing import Any

import pytest

from darkformer_jax.errors import UserError
from darkformer_jax.runs.metrics import MetricWriter
from darkformer_jax.runs.workdir import Workdir
from darkformer_jax.training.loss_curve import LossCurve, draw_loss_curve


def test_loss_curve_draws_both_losses(tmp_path: Path) -> None:
    writer = MetricWriter(Workdir(tmp_path))
    for step in range(1, 21):
        writer.write(step, {"loss": 3.0 / step})
        if step % 5 == 0:
            writer.write(step, {"heldout_loss": 3.3 / step})
    writer.close()
    path = draw_loss_curve(Workdir(tmp_path))
    assert path == tmp_path / "loss_curve.png"
    both = path.read_bytes()
    assert both.startswith(b"\x89PNG")
    # Colours of the two lines, from the picture itself.
    from matplotlib.image import imread

    pixels = {tuple(pixel) for row in (imread(path)[..., :3] * 255).round().astype(int).tolist() for pixel in row}
    assert (31, 119, 180) in pixels and (255, 127, 14) in pixels


def test_a_run_without_evaluations_or_with_a_nan_still_has_a_curve(tmp_path: Path) -> None:
    writer = MetricWriter(Workdir(tmp_path))
    writer.write(1, {"loss": 3.0})
    writer.write(2, {"loss": float("nan")})
    writer.close()
    assert draw_loss_curve(Workdir(tmp_path)).exists()


def test_nothing_to_draw_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"metrics\.jsonl cannot be read"):
        draw_loss_curve(Workdir(tmp_path))
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "accuracy": 1}\n')
    with pytest.raises(UserError, match=r"metrics\.jsonl has no loss to draw"):
        draw_loss_curve(Workdir(tmp_path))


def write_line(workdir: Path, step: int, loss: float | None) -> None:
    with (workdir / "metrics.jsonl").open("a") as file:
        file.write(f'{{"step": {step}, "loss": {json.dumps(loss)}}}\n')


def test_the_curve_is_renewed_while_a_run_trains_and_takes_two_hundredths_of_its_time_at_most(tmp_path: Path) -> None:
    times = iter([0.0, 1.0, 50.9, 51.0, 51.5, 76.4, 76.5, 77.0])  # a call looks once or, if it draws, twice
    curve = LossCurve(Workdir(tmp_path), lambda: next(times))
    pictures = []
    for step in range(1, 6):
        write_line(tmp_path, step, 3.0 / step)
        curve.renew()
        pictures.append((tmp_path / "loss_curve.png").read_bytes())
    assert [a == b for a, b in itertools.pairwise(pictures)] == [True, False, True, False]


def test_a_picture_that_fails_is_one_warning(tmp_path: Path, caplog: Any) -> None:
    curve = LossCurve(Workdir(tmp_path), lambda: 0.0)
    write_line(tmp_path, 1, None)
    with caplog.at_level(logging.WARNING, logger="absl"):
        curve.renew()
        curve.renew()
    (record,) = caplog.records
    assert record.getMessage().startswith("loss_curve.png is not renewed: ")
    assert record.getMessage().endswith("metrics.jsonl has no loss to draw; training goes on")
    write_line(tmp_path, 2, 3.0)
    curve.renew()
    assert (tmp_path / "loss_curve.png").exists()

import json
import logging
import re
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event, SessionLog

from darkformer_jax.errors import UserError
from darkformer_jax.runs.metrics import MetricWriter, read_metrics
from darkformer_jax.runs.workdir import Workdir


def train(workdir: Path, steps: range, resumed_from: int | None, seconds: float) -> None:
    writer = MetricWriter(Workdir(workdir), resumed_from)
    for step in steps:
        writer.write(step, {"loss": jnp.float32(1 / step)}, time={"seconds": seconds * step})
        if step % 4 == 0:
            writer.write(step, {"heldout_loss": np.float64(2 / step), "heldout_tokens": jnp.int32(7)})
    writer.close()


def without_time(workdir: Path) -> list[str]:
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [json.dumps({name: value for name, value in line.items() if name != "time"}) for line in lines]


def test_lines_are_plain_json_with_a_step(tmp_path: Path) -> None:
    train(tmp_path, range(3, 5), None, 1.5)
    assert read_metrics(Workdir(tmp_path)) == [
        {"step": 3, "loss": float(np.float32(1 / 3)), "time": {"seconds": 4.5}},
        {"step": 4, "loss": 0.25, "time": {"seconds": 6.0}},
        {"step": 4, "heldout_loss": 0.5, "heldout_tokens": 7},
    ]


def test_a_line_is_in_the_file_when_write_returns(tmp_path: Path) -> None:
    writer = MetricWriter(Workdir(tmp_path))
    writer.write(1, {"loss": jnp.bfloat16(2.5)})
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1, "loss": 2.5}\n'
    writer.close()


@pytest.mark.parametrize("killed_at", [5, 8, 9])
def test_killed_and_resumed_equals_unbroken_without_the_clock(tmp_path: Path, killed_at: int) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    train(whole, range(1, 13), None, 1.0)
    train(broken, range(1, killed_at + 1), None, 2.0)
    with open(broken / "metrics.jsonl", "a") as file:
        file.write('{"step": 10, "lo')  # kill -9 in the middle of a write
    train(broken, range(5, 13), 4, 3.0)  # the last checkpoint was step 4
    assert without_time(broken) == without_time(whole)
    assert (broken / "metrics.jsonl").read_text() != (whole / "metrics.jsonl").read_text()


def test_a_kill_before_the_first_checkpoint_starts_the_file_again(tmp_path: Path) -> None:
    train(tmp_path, range(1, 4), None, 1.0)
    train(tmp_path, range(1, 4), None, 1.0)
    assert [line["step"] for line in read_metrics(Workdir(tmp_path))] == [1, 2, 3]


def test_a_torn_or_damaged_line_is_dropped_and_named(tmp_path: Path, caplog: Any) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(
        b'{"step": 1, "loss": 3.0}\n\xff\x00\n[1]\n{"loss": 2.0}\n{"step": 2, "loss": 2.0}\n{"step": 3, "los'
    )
    with caplog.at_level(logging.WARNING, logger="absl"):
        assert [line["step"] for line in read_metrics(Workdir(tmp_path))] == [1, 2]
    assert [record.getMessage() for record in caplog.records] == [
        f"{path}: line {number} is not a metrics line and is dropped" for number in (2, 3, 4, 6)
    ]
    MetricWriter(Workdir(tmp_path), 2).close()
    assert path.read_text() == '{"step": 1, "loss": 3.0}\n{"step": 2, "loss": 2.0}\n'


def test_a_loss_that_is_not_finite_is_null(tmp_path: Path) -> None:
    writer = MetricWriter(Workdir(tmp_path))
    writer.write(1, {"loss": jnp.float32(jnp.nan), "grad_norm": float("inf")})
    writer.close()
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1, "loss": null, "grad_norm": null}\n'


def test_reserved_names_are_refused(tmp_path: Path) -> None:
    writer = MetricWriter(Workdir(tmp_path))
    with pytest.raises(ValueError, match="'time' is not a metric's name"):
        writer.write(1, {"time": 2.0})
    writer.close()


def test_tensorboard_gets_the_same_scalars_and_forgets_the_dropped_steps(tmp_path: Path) -> None:
    train(tmp_path, range(3, 5), 2, 1.0)
    events = []
    for path in (tmp_path / "tensorboard").iterdir():
        content = path.read_bytes()
        while content:  # TFRecord: length, its checksum, the event, its checksum
            (length,) = struct.unpack("<Q", content[:8])
            events.append(Event.FromString(content[12 : 12 + length]))
            content = content[16 + length :]
    scalars = [(event.step, value.tag, value.simple_value) for event in events for value in event.summary.value]
    assert scalars == [
        (3, "loss", np.float32(1 / 3)),
        (3, "time/seconds", 3.0),
        (4, "loss", 0.25),
        (4, "time/seconds", 4.0),
        (4, "heldout_loss", 0.5),
        (4, "heldout_tokens", 7.0),
    ]
    starts = [event.step for event in events if event.session_log.status == SessionLog.START]
    assert starts == [3]  # TensorBoard drops what earlier files say from step 3 on


def test_a_file_that_cannot_be_written_or_read(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(UserError, match=r"metrics\.jsonl cannot be written: Is a directory"):
        MetricWriter(Workdir(tmp_path))
    with pytest.raises(UserError, match=r"metrics\.jsonl cannot be read: No such file"):
        read_metrics(Workdir(tmp_path / "absent"))


@pytest.mark.parametrize("full", ["metrics.jsonl", "tensorboard"])
def test_a_disk_that_fills_up_is_one_clear_error_and_never_a_wait(tmp_path: Path, full: str) -> None:
    program = f"""
import resource, signal
from darkformer_jax.errors import UserError
from darkformer_jax.runs.metrics import MetricWriter
from darkformer_jax.runs.workdir import Workdir
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # a write beyond the limit then fails as on a full disk
writer = MetricWriter(Workdir({str(tmp_path)!r}))
if {full!r} == "metrics.jsonl":
    writer._file.write("x" * 20_000)
    writer._file.flush()
resource.setrlimit(resource.RLIMIT_FSIZE, (20_100, 20_100))
try:
    for step in range(10_000):
        writer.write(step, {{"loss": 1.0}}, time={{f"t{{i}}": 1.0 for i in range(20)}})
except UserError as error:
    print(step, error)
writer.close()
"""
    child = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=True)
    assert re.fullmatch(rf"\d+ {re.escape(str(tmp_path))}.* cannot be written: File too large\n", child.stdout)
    assert not child.stderr

"""A linearisation from its settings to the last stage's model."""

from collections.abc import Sequence
from pathlib import Path

from darkformer_jax.data.files import local_path
from darkformer_jax.data.progress import ProgressBar
from darkformer_jax.errors import UserError
from darkformer_jax.linearisation import plan, report
from darkformer_jax.linearisation.figures import measure
from darkformer_jax.linearisation.settings import (
    Settings,
    check_settings,
    has_stages,
    stage_directory,
    write_settings,
)
from darkformer_jax.linearisation.stages import Note, ProgressOf, run_stage
from darkformer_jax.linearisation.text import Text, read_text
from darkformer_jax.runs.workdir import Workdir


def linearise(settings: Settings, out: str, note: Note, progress_of: ProgressOf, progress_bar: ProgressBar) -> None:
    """Runs the stages that are not done, measures the model after each, and reports.

    Args:
      settings: what is asked for.
      out: the directory of all stages. It holds settings.json, report.json, report.png and a directory per stage.
      note: shows people a text.
      progress_of: makes the display of a training with this config.
      progress_bar: shows other work.

    Raises:
      Stopped: a signal came while a stage trained; the finished step is saved.
      UserError: what was asked for does not fit the model, the text, the disk or the directory; as the stages do.
    """
    directory = Path(local_path(out))
    exact = plan.exact_network(settings)
    check_settings(directory, settings)
    plans = plan.make_plan(settings, directory, exact)
    plan.require_room(plans, directory)
    text = read_text(settings)  # last, because it takes long
    check_settings(directory, settings, text.fingerprint)
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out={out} cannot be written: {error.strerror}") from error
    note(plan.describe(plans, text))
    with Workdir(directory).lock() as lock:
        lock.take()
        check_settings(directory, settings, text.fingerprint)  # another command may just have begun
        if not has_stages(directory):  # its figures may be those of other flags
            (directory / report.REPORT_FILE).unlink(missing_ok=True)
        write_settings(directory, settings, text.fingerprint)
        left = [stage.stage for stage in plans if stage.state != plan.DONE]
        rows = _run(settings, directory, left, text, note, progress_of, progress_bar)
    note(report.describe(rows, text, settings))
    last = stage_directory(directory, settings.stages[-1])
    note(f"report: {directory / report.REPORT_FILE}, {report.draw(directory, rows)}\nthe model: {last}")


def _run(
    settings: Settings,
    out: Path,
    left: Sequence[str],
    text: Text,
    note: Note,
    progress_of: ProgressOf,
    progress_bar: ProgressBar,
) -> report.Rows:
    """Runs the stages that are left; returns the figures."""
    about = {"text_fingerprint": text.fingerprint, "context": settings.longest, "copied": text.copied.shape[1]}
    about |= {"dtype": settings.dtype}
    rows = report.read_rows(out, about)
    places = {report.EXACT: Workdir(settings.workdir)}
    places |= {stage: Workdir(stage_directory(out, stage)) for stage in settings.stages}
    for number, (name, workdir) in enumerate(places.items()):
        if name in left:
            note(f"stage {number} of {len(settings.stages)}: {name}")
            run_stage(settings, out, name, note, progress_of, progress_bar)
        if name not in rows:
            rows[name] = measure(workdir, text, settings, progress_bar)
            report.write_rows(out, rows, about)
            note(f"{name}: bits per byte {rows[name].bits_per_byte:.4f}, copy {rows[name].copy:.3f} nats per token")
    return rows

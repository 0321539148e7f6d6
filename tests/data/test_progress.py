import threading

from darkformer_jax.data.progress import no_progress, time_shown


def test_time_is_shown_while_the_work_goes_on_and_not_after_it():
    ticked, after = threading.Event(), []

    def bar(total, unit, label=""):
        shown = no_progress(total, unit, label)
        shown.update, shown.close = ticked.set, lambda: after.append(ticked.is_set())
        return shown

    with time_shown(bar, "searching"):
        assert ticked.wait(60) and not after
    assert after

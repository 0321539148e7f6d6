import jaxtyping
import pytest


@pytest.fixture
def unchecked_types(monkeypatch):
    """For tests of arguments that the annotations exclude: a user, who has no type checker, gets our message."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)

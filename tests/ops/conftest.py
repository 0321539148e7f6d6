import jax
import jaxtyping
import pytest
from jax.experimental.compilation_cache import compilation_cache


@pytest.fixture
def unchecked_types(monkeypatch):
    """For tests of arguments that the annotations exclude: a user, who has no type checker, gets our message."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


@pytest.fixture
def without_cache():
    """Programs for a TPU that is not attached cannot be read back from the cache."""
    compilation_cache.reset_cache()
    jax.config.update("jax_enable_compilation_cache", False)
    yield
    jax.config.update("jax_enable_compilation_cache", True)
    compilation_cache.reset_cache()

"""How every test runs: on the CPU, ranks and dtypes never promoted silently, warnings as errors (pyproject.toml).

Platform and ranks are set through the environment, before jax is imported, so that programs which tests start run the
same way. Float64 is off; oracles ask for it with `with jax.enable_x64(True):`. `JAX_PLATFORMS=cuda launch/test.sh`
runs the tests on a GPU.
"""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_NUMPY_RANK_PROMOTION", "raise")
os.environ.setdefault("MPLBACKEND", "Agg")
# The workers and the programs that tests start have huge pages from their beginning, and need no second start.
os.environ.setdefault("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1")
# Compiling is most of the time of a test run: the second run and the programs that tests start find it done.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parents[1] / ".cache" / "jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")
os.environ.setdefault("JAX_COMPILATION_CACHE_MAX_SIZE", str(2**30))  # bytes; the least recently used go first
# XLA's own passes as ever, LLVM's not: a third less time. JAX_DISABLE_MOST_OPTIMIZATIONS=0 launch/test.sh has them.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")

import jax  # after the lines above, which it reads
import numpy as np

if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:  # under nohup, which the programs that tests start must not see
    signal.signal(signal.SIGHUP, lambda *_: None)

_UNOPTIMISED = os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"]
_NUMERICS = ("ops", "mixers")  # these folders are compiled as users compile


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "standard_promotion: dtypes promote as usual, because optax needs it")
    if not hasattr(config, "workerinput"):  # once, before pytest-xdist's workers start
        _remove_torn_cache_entries(Path(os.environ["JAX_COMPILATION_CACHE_DIR"]))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Before any fixture, so that those of a module are compiled as its tests are."""
    folder = item.path.relative_to(item.config.rootpath).parts[1]
    os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = value = "0" if folder in _NUMERICS else _UNOPTIMISED
    is_unoptimised = value == "1"
    if jax.config.read("jax_disable_most_optimizations") != is_unoptimised:
        jax.clear_caches()  # which do not depend on it
        jax.config.update("jax_disable_most_optimizations", is_unoptimised)


def _remove_torn_cache_entries(cache: Path) -> None:
    """What a killed test left behind: jax writes an entry, then its time, and warns of each entry without one."""
    for entry in cache.glob("*-cache"):
        if not entry.with_name(entry.name.removesuffix("-cache") + "-atime").exists():
            entry.unlink(missing_ok=True)


@pytest.fixture(autouse=True)
def strict_dtype_promotion(request: pytest.FixtureRequest) -> Iterator[None]:
    """bfloat16 + float32 is an error, except where an optimizer runs: optax computes float ** int32.

    That is everything in tests/training/ and tests/runs/, and any test or module elsewhere marked `standard_promotion`.
    """
    standard = bool({"training", "runs"} & set(request.path.relative_to(request.config.rootpath).parts))
    standard = standard or request.node.get_closest_marker("standard_promotion") is not None
    with jax.numpy_dtype_promotion("standard" if standard else "strict"):
        yield


@pytest.fixture(autouse=True)
def own_random_numbers(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A test draws the same numbers alone, after others, and in any of pytest-xdist's workers."""
    if isinstance(getattr(request.module, "random", None), np.random.Generator):
        monkeypatch.setattr(request.module, "random", np.random.default_rng(0))


_MAPS = Path("/proc/self/maps")  # of Linux alone
_MANY_MAPS = 30_000  # Linux allows a process 65,530


@pytest.fixture(autouse=True)
def bounded_memory_maps() -> Iterator[None]:
    """Compiled programs without LLVM's optimisations are hundreds of memory maps each; a process may not have more."""
    yield
    if _MAPS.exists() and _MAPS.read_bytes().count(b"\n") > _MANY_MAPS:
        jax.clear_caches()

"""What every test runs under: two fake devices, strict JAX, shapes and types checked."""

import gc
import json
import os
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["RLHF_PRECISION"] = "float32"  # the reference, whatever the machine
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test waits for a network

import jax
import pytest
from jaxtyping import install_import_hook

jax.config.update("jax_num_cpu_devices", 2)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_debug_key_reuse", True)
install_import_hook(["experiment_runs", "rlhf_jax", "gan_jax"], "beartype.beartype")


def pytest_configure(config):
    # Programs compile once: for every process that the tests start, and for their next run.
    folder = os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(config.cache.mkdir("jax")))
    least = os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    jax.config.update("jax_compilation_cache_dir", folder)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", float(least))


# Files that are begun first, so that no process waits for them at the end.
LONGEST = "test_submission.py", "test_wheel.py", "test_mesh.py", "test_hosts.py", "test_survival.py"


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.path.name not in LONGEST)


def pytest_collection_finish():
    gc.freeze()  # what is imported by now: no collection of garbage need go through it again


def pytest_addoption(parser):
    parser.addoption("--record", help="keep what was measured of the invariants in this file")


MEASURED = pytest.StashKey[dict]()


@pytest.fixture
def measured(request):
    """A function that checks a measured value against its limit; see the option --record."""
    rows = request.config.stash.setdefault(MEASURED, {})

    def check(invariant, value, limit):
        worst = max(float(value), rows.get(invariant, {}).get("measured", 0.0))
        rows[invariant] = {"invariant": invariant, "measured": worst, "at most": limit}
        assert value <= limit, invariant

    return check


def pytest_sessionfinish(session):
    if file := session.config.getoption("--record"):
        rows = [*session.config.stash.get(MEASURED, {}).values()]
        Path(file).write_text(json.dumps(rows, indent=1) + "\n")

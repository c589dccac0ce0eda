"""What every test runs under: two fake devices, strict JAX, shapes and types checked."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test waits for a network

import jax
from jaxtyping import install_import_hook

jax.config.update("jax_num_cpu_devices", 2)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_debug_key_reuse", True)
install_import_hook(["rlhf_jax", "gan_jax"], "beartype.beartype")


def pytest_configure(config):
    # Programs compile once: a resumed run, and the next run of the tests, find them here.
    jax.config.update("jax_compilation_cache_dir", str(config.cache.mkdir("jax")))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)

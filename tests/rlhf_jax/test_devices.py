import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("device_flops.py")


@pytest.fixture(scope="module")
def flops(request):
    """By program, what one device computes where the same batch is divided over 1 to 8."""
    root = request.config.rootpath
    own = {
        "PYTHONPATH": str(root),
        "JAX_COMPILATION_CACHE_DIR": str(request.config.cache.mkdir("jax")),
    }
    done = subprocess.run(
        [sys.executable, SCRIPT], env=os.environ | own, cwd=root,
        capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("program", ["sampling", "PPO update", "reward step"])
def test_every_device_computes_its_share_and_hardly_more(flops, program):
    found = {int(count): value for count, value in flops[program].items()}
    assert list(found) == [1, 2, 4, 8]
    for count, own in found.items():
        assert found[1] / count >= 0.85 * own, f"{count} devices"

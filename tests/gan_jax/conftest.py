"""A small labelled image set on disk and one finished tiny run, shared by the tests of the GAN."""

import jax
import numpy as np
import pytest

from gan_jax import PROFILES, data, experiment


@pytest.fixture(autouse=True, scope="session")
def quick_compilation():
    """Without optimisation: these tests compile much and compute little."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def medmnist_arrays(count: int = 160) -> dict[str, np.ndarray]:
    """A DermaMNIST file of noisy squares whose brightness is their class."""
    random = np.random.default_rng(0)
    arrays = {}
    for split in ("train", "val", "test"):
        labels = random.integers(7, size=(count, 1), dtype=np.uint8)
        noise = random.normal(0, 20, (count, 28, 28, 3))
        arrays[f"{split}_images"] = np.uint8((30 * labels[:, :, None, None] + noise).clip(0, 255))
        arrays[f"{split}_labels"] = labels
    return arrays


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    (folder / "medmnist").mkdir()
    np.savez(folder / "medmnist" / "dermamnist.npz", **medmnist_arrays())
    return folder


@pytest.fixture(scope="session")
def squares(data_dir):
    return data.load("dermamnist", side=28, data_dir=data_dir, student_id=None)


@pytest.fixture(scope="session")
def tiny():
    return PROFILES["tiny"]


@pytest.fixture(scope="session")
def finished(tiny, data_dir, tmp_path_factory):
    """A finished run of the tiny profile."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RLHF_RESULTS", str(tmp_path_factory.mktemp("results")))
        return experiment.run(tiny, data_dir=data_dir)

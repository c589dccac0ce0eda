"""Several processes that train together over the loopback interface."""

import os
import socket
import subprocess
import sys

import numpy as np
import pytest

from experiment_runs import hosts
from experiment_runs.errors import UserError
from experiment_runs.run import Run

COMMAND = [sys.executable, "-m", "rlhf_jax"]


@pytest.fixture
def start(request, local_data, tmp_path):
    """A function that starts the processes of a job, each with so many devices."""
    data, started = local_data(), []

    def run(results, *arguments, processes, devices):
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        jobs = []
        for number in range(processes):
            own = {
                "PYTHONPATH": str(request.config.rootpath),
                "JAX_PLATFORMS": "cpu",
                "JAX_NUM_CPU_DEVICES": str(devices),
                "JAX_COMPILATION_CACHE_DIR": str(request.config.cache.mkdir("jax")),
                "HF_HUB_OFFLINE": "1",
                "RLHF_DATA_DIR": str(data),
                "RLHF_RESULTS": str(tmp_path / results),
                "RLHF_HOSTS": f"localhost:{port}/{processes}/{number}" if processes > 1 else "",
            }
            file = (tmp_path / f"{results}-{number}.txt").open("a+")
            job = subprocess.Popen(
                [*COMMAND, *arguments, "--profile", "tiny"], env=os.environ | own, stdout=file,
                stderr=file,
            )  # fmt: skip
            job.log = file
            jobs.append(job)
        started.extend(jobs)
        return jobs

    yield run
    for job in started:
        job.kill()
        job.wait()
        job.log.close()


def finished(jobs, seconds=1500):
    """Waits for all; every one must have ended well."""
    for job in jobs:
        code = job.wait(seconds)
        job.log.seek(0)
        assert code == 0, job.log.read()


def same(ours, theirs):
    """How many runs there are, with the same metrics; what no two have in common apart."""
    found = sorted(path.name for path in ours.iterdir())
    assert found == sorted(path.name for path in theirs.iterdir())
    for name in found:
        metrics = [Run(root / name).metrics() for root in (ours, theirs)]
        for column in metrics[0].columns:
            if "second" in column or "memory" in column or "histogram" in column:
                continue
            values = (np.asarray(own[column], float) for own in metrics)
            np.testing.assert_allclose(*values, rtol=1e-4, atol=1e-4, err_msg=f"{name} {column}")
    return len(found)


@pytest.mark.parametrize(
    ("command", "runs"),
    [
        pytest.param("reward", 1, marks=pytest.mark.slow),
        pytest.param("run", 6, marks=pytest.mark.exhaustive),
    ],
)
def test_two_processes_train_what_one_trains(start, tmp_path, command, runs):
    finished(start("two", command, processes=2, devices=1))
    finished(start("one", command, processes=1, devices=2))
    assert same(tmp_path / "two", tmp_path / "one") == runs


@pytest.mark.parametrize("asked", ["here", "localhost:1/2", "localhost:1/2/2", "localhost/2/0"])
def test_hosts_that_cannot_be_read_are_told(monkeypatch, asked):
    monkeypatch.setenv("RLHF_HOSTS", asked)
    with pytest.raises(UserError, match=f"RLHF_HOSTS={asked}: write auto, or ADDRESS:PORT/COUNT"):
        hosts.join()


def test_one_process_is_the_first_and_waits_for_nobody(tmp_path):
    assert hosts.first() and not hosts.several() and hosts.any_of(True) and not hosts.any_of(False)
    hosts.meet("nobody")
    with hosts.own_copy(tmp_path) as own:
        assert own == tmp_path

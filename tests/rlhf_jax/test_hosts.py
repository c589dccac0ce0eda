"""Several processes that train together over the loopback interface."""

import os
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest

from experiment_runs import hosts
from experiment_runs.errors import UserError
from experiment_runs.run import Run

COMMAND = [sys.executable, "-m", "rlhf_jax", "run", "--profile", "tiny"]


@pytest.fixture
def start(request, local_data, tmp_path):
    """A function that starts the processes of a job, each with so many devices."""
    data, started = local_data(), []

    def run(results, *, processes, devices, **more):
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
            jobs.append(
                subprocess.Popen(COMMAND, env=os.environ | own | more, stdout=file, stderr=file)
            )
            jobs[-1].said = lambda file=file: (file.seek(0), file.read())[1]
        started.extend(jobs)
        return jobs

    yield run
    for job in started:
        job.kill()
        job.wait()


def finished(jobs, seconds=1500):
    """Waits for all; every one must have ended well."""
    for job in jobs:
        assert job.wait(seconds) == 0, job.said()


def same(ours, theirs):
    """Every stage has the same metrics; what no two runs have in common apart."""
    found = sorted(path.name for path in ours.iterdir())
    assert found == sorted(path.name for path in theirs.iterdir()) and len(found) > 4
    for name in found:
        metrics = [Run(root / name).metrics() for root in (ours, theirs)]
        for column in metrics[0].columns:
            if "second" in column or "memory" in column or "histogram" in column:
                continue
            values = (np.asarray(own[column], float) for own in metrics)
            np.testing.assert_allclose(*values, rtol=1e-4, atol=1e-4, err_msg=f"{name} {column}")


@pytest.mark.slow
def test_two_processes_train_what_one_trains(start, tmp_path):
    finished(start("two", processes=2, devices=1))
    finished(start("one", processes=1, devices=2))
    same(tmp_path / "two", tmp_path / "one")


@pytest.mark.slow
def test_when_one_process_is_killed_the_others_end_and_the_job_can_go_on(start, tmp_path):
    jobs = start("two", processes=2, devices=1, RLHF_CHECKPOINT_SECONDS="0")
    log = tmp_path / "two"
    until(lambda: [*log.glob("ppo-full*/metrics.jsonl")], jobs)
    jobs[1].send_signal(signal.SIGKILL)
    assert jobs[0].wait(120) != 0
    assert jobs[0].said().count("error: another process of this job has ended") == 1, jobs[0].said()
    finished(start("two", processes=2, devices=1, RLHF_CHECKPOINT_SECONDS="0"))
    assert all(Run(path).finished for path in log.iterdir())


def until(condition, jobs, seconds=900):
    ends = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < ends and all(job.poll() is None for job in jobs), jobs[0].said()
        time.sleep(0.1)


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

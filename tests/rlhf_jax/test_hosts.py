"""Several processes that train together over the loopback interface."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from flax import nnx

from experiment_runs import hosts
from experiment_runs.errors import UserError
from experiment_runs.run import Run
from gan_jax.export import load_networks
from rlhf_jax import load
from rlhf_jax.export.huggingface import export_policy

ROOT = Path(__file__).resolve().parent.parent.parent
RLHF = [sys.executable, "-m", "rlhf_jax"]
GAN = [sys.executable, "-m", "gan_jax"]
MEETING = """
import sys
import numpy as np
from experiment_runs import command, hosts, precision

def work():
    hosts.join()
    precision.fast_flag = lambda: "amx_bf16" if sys.argv[1] == "0" else None
    assert precision.resolved() == "mixed"  # what the first one is fast in
    own = np.full(3, 1 + float(sys.argv[1]), np.float32)
    assert (hosts.of_first({"rewards": own})["rewards"] == 1).all()
    hosts.meet("door")
    hosts.meet("room " + sys.argv[1])

code = command.concluded(work)
hosts.left(code)
"""
REWARDED = """
import json, os, pathlib
import jax
import rlhf_jax

results = pathlib.Path(os.environ["RLHF_RESULTS"])
def letters(prompts, responses):
    with (results / "asked.jsonl").open("a") as file:
        file.write(json.dumps([prompts, responses]) + "\\n")
    return [sum(map(ord, text)) / 1000 for text in responses]

def rank(prompts, responses):
    sums = jax.numpy.asarray([sum(text.encode()) for text in responses])
    return jax.jit(lambda x: x.argsort().argsort())(sums)

model = rlhf_jax.load(os.environ["RLHF_MODEL"])
judge = rlhf_jax.train_reward_model(
    model, [{"prompt": f"p{n}", "chosen": f"a {n}", "rejected": f"b {n}"} for n in range(24)],
    config=rlhf_jax.RewardConfig(epochs=1, max_tokens=96, reference_samples=8),
)
config = rlhf_jax.PPOConfig(
    batch=8, forward_batch=4, prompts=8, passes=2, inner_epochs=2, prompt_tokens=48,
    response_tokens=4, value_learning_rate=1e-3, learning_rate=1e-3, sample_every=1,
)
tuned = rlhf_jax.train_policy(
    model, [f"question {n}" for n in range(8)], config=config,
    reward={"letters": (letters, 0.5), "rank": (rank, 0.1), "judge": (judge.score, 1.0)},
    reward_name="three",
)
tuned.save(results.with_name("saved-" + results.name))
"""
SMALL = [  # of the cpu profile, whose model is SmolLM2
    "--reward.train-pairs", "24", "--reward.validation-pairs", "8", "--reward.test-pairs", "8",
    "--reward.max-tokens", "96", "--reward.reference-samples", "8",
    "--lora.prompts", "16", "--lora.batch", "8", "--lora.forward-batch", "4",
    "--lora.response-tokens", "8", "--ppo.prompts", "16", "--evaluation.prompts", "8",
]  # fmt: skip
SRUN = """#!/bin/bash
for number in 0 1; do SLURM_PROCID=$number SLURM_LOCALID=$number "$@" & done
wait -n && wait -n
"""


@pytest.fixture
def start(request, local_data, model, tmp_path):
    """A function that starts a command with results of its own, and writes down what it says."""
    data, started, weights = local_data(), [], tmp_path / "model"
    export_policy(nnx.merge(model.definition, model.state), model, weights, {})

    def run(results, *command, devices, **environment):
        own = {
            "PYTHONPATH": str(ROOT),
            "JAX_PLATFORMS": "cpu",
            "JAX_NUM_CPU_DEVICES": str(devices),
            "JAX_COMPILATION_CACHE_DIR": str(request.config.cache.mkdir("jax")),
            "HF_HUB_OFFLINE": "1",
            "RLHF_PROFILE": "tiny",
            "RLHF_DATA_DIR": str(data),
            "RLHF_MODEL": str(weights),
            "RLHF_RESULTS": str(tmp_path / results),
        }
        file = (tmp_path / f"{results}-{len(started)}.txt").open("a+")
        job = subprocess.Popen(
            command, env=os.environ | own | environment, stdout=file, stderr=file,
            start_new_session=True,
        )  # fmt: skip
        job.log = file
        started.append(job)
        return job

    yield run
    for job in started:
        with contextlib.suppress(ProcessLookupError):  # it has ended, with all that it started
            os.killpg(job.pid, signal.SIGKILL)
        job.wait()
        job.log.close()


@pytest.fixture
def several(start):
    """A function that starts the processes of a job, two or more, with one device each."""

    def run(results, *arguments, program=RLHF, count=2, **environment):
        with socket.socket() as free:
            free.bind(("localhost", 0))
            address = f"localhost:{free.getsockname()[1]}"
        return [
            start(
                results,
                *program,
                *(str(x).format(number=number) for x in arguments),
                devices=1,
                RLHF_HOSTS=f"{address}/{count}/{number}",
                **environment,
            )
            for number in range(count)
        ]

    return run


def finished(*jobs):
    """Waits for all; every one must have ended well."""
    for job in jobs:
        code = job.wait(1500)
        assert code == 0, said(job)


def said(job):
    job.log.seek(0)
    return job.log.read()


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


@pytest.mark.exhaustive
@pytest.mark.parametrize("count", [2, 4])
def test_several_processes_train_what_one_trains(start, several, tmp_path, count):
    finished(*several("several", "run", count=count))
    finished(start("one", *RLHF, "run", devices=count))
    assert same(tmp_path / "several", tmp_path / "one") > 4


@pytest.mark.exhaustive
@pytest.mark.parametrize(("count", "stages"), [(2, ("ppo", "--variant", "lora")), (4, ("reward",))])
def test_several_processes_train_smollm2_as_one_does(start, several, tmp_path, count, stages):
    """Of four, which add up in another order than one, the reward model alone: what is sampled
    flips where rounding decides, and with it the scale of the reward. They take some 19 GB."""
    train = (*stages, *SMALL)
    smollm2 = {"RLHF_PROFILE": "cpu", "RLHF_MODEL": ""}
    finished(*several("several", *train, count=count, **smollm2))
    finished(start("one", *RLHF, *train, devices=count, **smollm2))
    assert same(tmp_path / "several", tmp_path / "one") == (2 if stages[0] == "ppo" else 1)


@pytest.mark.exhaustive
def test_several_processes_train_the_gan_that_one_trains(start, several, tmp_path):
    """And write one checkpoint, from which another job goes on and any process reads."""
    train = ("train", "--profile", "tiny", "--dataset", "histology")
    finished(*several("two", *train, program=GAN))
    finished(start("one", *GAN, *train, devices=2))
    assert same(tmp_path / "two", tmp_path / "one") == 1
    (run,) = map(Run, (tmp_path / "two").iterdir())
    assert load_networks(run)[0].seed == 0
    finished(*several("two", "evaluate", run.path, program=GAN))


@pytest.mark.slow
def test_what_the_script_for_slurm_starts_trains_what_one_process_trains(start, tmp_path):
    """With functions as rewards, which are asked once for every row, whatever they make of the rows
    beside one, as a rank does."""
    (tmp_path / "srun").write_text(SRUN)
    (tmp_path / "srun").chmod(0o755)
    (tmp_path / "rewarded.py").write_text(REWARDED)
    for name in ("two", "one"):
        (tmp_path / name).mkdir()
    own = {"PYTHONPATH": os.pathsep.join((str(ROOT), str(tmp_path)))}
    cluster = {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "PYTHON": sys.executable,
        "SLURM_JOB_ID": str(os.getpid()),  # which the port is made from
        "SLURM_STEP_NODELIST": "localhost",
        "SLURM_NTASKS": "2",
    }
    script = str(ROOT / "examples" / "slurm.sh")
    finished(start("two", script, "rewarded", devices=1, **own, **cluster))
    finished(start("one", sys.executable, "-m", "rewarded", devices=2, **own))
    asked = [(tmp_path / name / "asked.jsonl") for name in ("two", "one")]
    assert len(asked[0].read_text().splitlines()) == 2
    assert asked[0].read_text() == asked[1].read_text()
    for file in asked:
        file.unlink()
    assert same(tmp_path / "two", tmp_path / "one") == 2
    assert load(tmp_path / "saved-two").config == load(tmp_path / "saved-one").config


def test_where_nobody_listens_the_others_are_told(monkeypatch, capsys):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    monkeypatch.setenv("RLHF_HOSTS", f"{address}/2/1")
    monkeypatch.setattr(hosts, "ABSENT", 0)
    with pytest.raises(UserError, match=f"nobody listens at {address} .*; start process 0 there"):
        hosts.join()
    assert f"process 1 of 2 meets the others at {address}" in capsys.readouterr().err


@pytest.mark.slow
def test_processes_with_other_settings_are_told_and_a_command_for_one_process_is_refused(several):
    """What the first one has read is what all have."""
    jobs = several("met", "{number}", program=[sys.executable, "-c", MEETING], RLHF_PRECISION="")
    for number, job in enumerate(jobs):
        assert job.wait(600) == 2
        told = f"process {number} of this job is at the room {number}, another one is not"
        assert said(job).count(told) == 1
    for job in several("listed", "runs", "list"):
        assert job.wait(600) == 2
        assert said(job).count("error: runs works in one process: call it without RLHF_HOSTS") == 1


@pytest.mark.exhaustive
@pytest.mark.parametrize("killed", [0, 1])
def test_when_one_process_is_killed_the_other_ends_and_the_job_goes_on(
    several, tmp_path, monkeypatch, killed
):
    """From where it was: what had been logged before what was saved is not logged again. With the
    first process goes the service by which they find each other, and JAX may end the others."""
    monkeypatch.setenv("RLHF_CHECKPOINT_SECONDS", "0")
    arguments = ["reward", "--reward.epochs", "40", "--reward.reference-samples", "8"]
    jobs = several("two", *arguments)
    pattern = "reward-*/checkpoints/resume/*"
    while not (saved := [p for p in (tmp_path / "two").glob(pattern) if p.name.isdigit()]):
        assert [job.poll() for job in jobs] == [None, None], said(jobs[0])
        time.sleep(0.1)
    jobs[killed].kill()
    other = jobs[1 - killed]
    assert other.wait(120) != 0
    told = said(other).count("error: another process of this job has ended")
    assert told == 1 or (killed == 0 and "coordination" in said(other).lower()), said(other)
    (path,) = (tmp_path / "two").iterdir()
    logged = (path / "metrics.jsonl").read_text().splitlines()[: int(saved[0].name)]
    finished(*several("two", *arguments))
    assert Run(path).finished
    assert logged and (path / "metrics.jsonl").read_text().splitlines()[: len(logged)] == logged


@pytest.mark.parametrize(
    "asked", ["here", "localhost:1/2", "localhost:1/2/2", "localhost/2/0", f"a:1/{'9' * 5000}/0"]
)
def test_hosts_that_cannot_be_read_are_told(monkeypatch, asked):
    monkeypatch.setenv("RLHF_HOSTS", asked)
    with pytest.raises(UserError, match=f"RLHF_HOSTS={asked[:20]}.*write auto, or ADDRESS:"):
        hosts.join()


def test_one_process_is_the_first_and_waits_for_nobody(tmp_path):
    assert hosts.first() and not hosts.several() and hosts.any_of(True) and not hosts.any_of(False)
    hosts.meet("nobody")
    with hosts.own_copy(tmp_path) as own, hosts.first_ahead("nobody"):
        assert own == tmp_path


@pytest.mark.parametrize("number", [0, 1])
def test_the_others_wait_for_the_first_where_it_goes_ahead(monkeypatch, number):
    """Also where it fails, so that they can fail themselves."""
    seen = []
    monkeypatch.setattr(hosts, "first", lambda: number == 0)
    monkeypatch.setattr(hosts, "meet", seen.append)
    with contextlib.suppress(OSError), hosts.first_ahead("download"):
        seen.append("tried")
        raise OSError("no network")
    assert seen == (["tried", "download"] if number == 0 else ["download", "tried"])


@pytest.mark.parametrize("number", [0, 1])
def test_a_run_is_not_changed_before_all_have_their_copy(monkeypatch, tmp_path, number):
    """Of two processes: the first works in the folder itself."""
    (tmp_path / "answers.json").write_text("{}")
    met = []
    monkeypatch.setattr(hosts, "first", lambda: number == 0)
    monkeypatch.setattr(hosts, "meet", lambda where: met.append(where))
    with hosts.own_copy(tmp_path) as own:
        assert (own == tmp_path) is (number == 0) and (own / "answers.json").exists()
        assert len(met) == 1

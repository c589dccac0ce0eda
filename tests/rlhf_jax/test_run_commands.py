"""Commands that are given a run: model and configuration come from its record alone."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest
from flax import nnx

from experiment_runs import run as runs
from experiment_runs.checkpoints import save_weights
from experiment_runs.errors import UserError
from experiment_runs.files import read_jsonl
from rlhf_jax import config, profiles, run_commands, trained
from rlhf_jax.__main__ import main, other_precisions
from rlhf_jax.ppo import training as ppo_training
from rlhf_jax.pretrained import hub
from rlhf_jax.ratings.store import CRITERIA
from rlhf_jax.reward_model import model as reward_models

ABOUT = {
    "profile": {"name": "tiny", "promise": ""},
    "model": {"name": "random", "file": "random weights", "dtype": "float32"},
    **{
        name: {"name": "rows", "kind": "local", "rows": 4, "licence": "own"}
        for name in ("preferences", "prompts")
    },
}  # fmt: skip
MODELS = ("pretrained", "ppo-lora")
CFG = dataclasses.replace(  # settings that no profile has
    profiles.profile("tiny").lora,
    prompt_tokens=40,
    response_tokens=5,
    lora=config.LoRAConfig(rank=3),
)


@pytest.fixture(scope="module")
def results(model, tmp_path_factory):
    """A folder with a reward model, a policy with adapters that do something, and an evaluation."""
    root, identity = tmp_path_factory.mktemp("results"), hub.identity(None, dtype="float32")

    def ensured(stage, cfg, train, **inputs):
        inputs |= {"model": identity}
        return runs.ensure(stage, cfg, train, inputs=inputs, about=ABOUT, root=root)

    def reward(run):
        save_weights(run.checkpoints / "best", reward_models.initial(model, 0)[1])
        interval = {"value": 0.7, "low": 0.6, "high": 0.8, "count": 9}
        run.finish(
            scale={"offset": 0.0, "gain": 1.0}, accuracy=interval, length_correlation=0.1,
            baselines={"longer": {"accuracy": interval}},
        )  # fmt: skip

    def ppo(run):
        start = ppo_training.untrained(model, CFG).trainable
        save_weights(run.checkpoints / "policy", jax.tree.map(lambda x: x + 0.3, start))
        run.finish(reward_last_quarter=0.3, kl_last_quarter=0.04, trained_parameters={"x": 9})

    def evaluate(run):
        run.sample(step=0, prompt_id=0, model="ppo-lora", prompt="p", response="r", rated=True)
        run.finish()

    reward_model = ensured("reward", profiles.profile("tiny").reward, reward).identity
    policy = ensured("ppo-lora", CFG, ppo, reward=reward_model).identity
    names = {"reward": reward_model, "ppo-lora": policy}
    ensured("evaluate", profiles.profile("tiny").evaluation, evaluate, **names)
    return root


@pytest.fixture(autouse=True)
def another_environment(monkeypatch, tmp_path):
    """What the environment asks for has nothing to do with these runs."""
    monkeypatch.setenv("RLHF_PROFILE", "assignment")
    monkeypatch.setenv("RLHF_RESULTS", str(tmp_path / "elsewhere"))
    monkeypatch.chdir(tmp_path)
    yield
    assert not (tmp_path / "elsewhere").exists()  # nothing was trained


def directory(results, stage):
    (path,) = results.glob(f"{stage}-*")
    return str(path)


@pytest.mark.parametrize("stage", ["ppo-lora", "reward"])
def test_a_run_of_changed_settings_is_exported(results, stage, tmp_path, capsys):
    main(["export", directory(results, stage), "--out", "exported"])
    assert capsys.readouterr().out == "wrote exported\n"
    if stage == "ppo-lora":
        written = json.loads((tmp_path / "exported" / "adapter_config.json").read_text())
        assert written["r"] == 3
    else:
        assert (tmp_path / "exported" / "model.safetensors").is_file()


@pytest.mark.parametrize("stage", ["ppo-lora", "evaluate"])
def test_a_run_answers_in_a_conversation(results, stage, monkeypatch, capsys):
    questions = iter(["Why?", ""])
    monkeypatch.setattr("builtins.input", lambda prompt: next(questions))
    main(["chat", directory(results, stage)])
    said = capsys.readouterr().out
    assert "\npretrained (reward " in said and "\nppo-lora (reward " in said


def test_a_run_answers_in_the_precision_that_is_asked_for(results, monkeypatch):
    asked = []

    def chat(policies, *_, **lengths):
        asked.append({nnx.merge(*policy).cfg.dtype for policy in policies.values()})

    monkeypatch.setattr(run_commands, "chat", chat)
    for options in ([], ["--precision", "mixed"]):
        main(["chat", directory(results, "ppo-lora"), *options])
    assert asked == [{"float32"}, {"mixed"}]


def test_runs_of_another_precision_alone_are_named_with_what_goes_on_with_them(results):
    assert other_precisions(results, "float32") == []
    assert other_precisions(results, "mixed") == ["float32"]
    assert other_precisions(results / "none", "mixed") == []


def test_answers_to_many_prompts_are_written_as_rows(results, tmp_path):
    (tmp_path / "prompts.txt").write_text("".join(f"Question {i}?\n" for i in range(34)))
    command = ["generate", directory(results, "ppo-lora"), "--file", "prompts.txt"]
    main([*command, "--prompt", "First", "--samples", "2", "--out", "rows.jsonl"])
    rows = read_jsonl(tmp_path / "rows.jsonl")
    assert len(rows) == 2 * 2 * 35 and {row["model"] for row in rows} == {*MODELS}
    assert [row["prompt"] for row in rows[:3]] == ["First", "First", "Question 0?"]
    answers = {name: [r["response"] for r in rows if r["model"] == name] for name in MODELS}
    assert answers["pretrained"] != answers["ppo-lora"]
    assert any(a != b for a, b in zip(rows[:-1:2], rows[1::2], strict=False))
    with pytest.raises(SystemExit):
        main([*command, "--out", "rows.jsonl"])  # is there already


def test_answers_are_shown_where_no_file_is_named(results, capsys):
    main(["generate", directory(results, "ppo-lora"), "--prompt", "Wh\x1b[2Jy?"])
    said = capsys.readouterr().out
    assert "> Wh⟨U+001B⟩[2Jy?\npretrained" in said and "\nppo-lora" in said and "\x1b" not in said


def test_an_evaluation_is_rated(results, monkeypatch):
    answers = iter(["5"] * len(CRITERIA) + [""])
    monkeypatch.setattr("builtins.input", lambda question: next(answers))
    main(["rate", directory(results, "evaluate"), "--rater", "A"])
    assert len(read_jsonl(next(results.glob("evaluate-*/ratings.jsonl")))) == 1


def test_a_rater_rates_in_one_place_at_a_time(results, monkeypatch, capsys):
    path = directory(results, "evaluate")

    def ask(question):
        with pytest.raises(SystemExit):
            main(["rate", path, "--rater", "Ada"])  # the same name, elsewhere
        monkeypatch.setattr("builtins.input", lambda question: "q")
        main(["rate", path, "--rater", "Grace"])
        return "q"

    monkeypatch.setattr("builtins.input", ask)
    main(["rate", path, "--rater", "Ada"])
    assert "is at work there" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate", "ppo-lora"], "no prompt; give --prompt"),
        (["generate", "reward", "--prompt", "p"], "stage 'reward', which has no policy"),
        (["generate", "ppo-lora", "--prompt", "p", "--samples", "0"], "--samples and --tokens"),
        (
            ["generate", "ppo-lora", "--prompt", "p", "--temperature", "nan"],
            "temperature=nan is impossible: must",
        ),
        (
            ["generate", "ppo-lora", "--prompt", "p", "--seed", "-1"],
            "seed=-1 is impossible: must be from 0 to",
        ),
        (["generate", "ppo-lora", "--file", "none"], "--file none: cannot be read"),
        (["rate", "ppo-lora", "--rater", "A"], "a run of stage 'ppo-lora'; name one of 'evaluate'"),
        (["export", "evaluate"], "stage 'evaluate' has no weights to export"),
        (["chat", "ppo-lora", "--model", "nowhere/else"], "nowhere/else"),
        (["chat", "ppo-lora", "--model", "owner/name:"], "has no such GGUF file"),
        (["chat", "ppo-lora", "--judge", "random"], "--judge random: no reward model"),
        (["generate", "ppo-lora", "--prompt", "\udcff"], "--prompt '\\udcff': not UTF-8"),
        (["generate", "ppo-lora", "--file", "/dev/zero"], "/dev/zero: not a regular file"),
        (["rate", "evaluate", "--rater", "\udcff"], "rater '\\udcff': not UTF-8"),
    ],
)
def test_what_a_run_cannot_do_is_told_in_one_message(results, arguments, message, capsys):
    command, stage, *rest = arguments
    with pytest.raises(SystemExit) as stopped:
        main([command, directory(results, stage), *rest])
    said = capsys.readouterr().err
    assert stopped.value.code == 2 and message in said and said.count("\n") == 1


def test_another_model_than_a_run_started_from_is_refused(results, tmp_path):
    copy = tmp_path / "ppo-lora-copy"
    shutil.copytree(directory(results, "ppo-lora"), copy)
    record = json.loads((copy / "config.json").read_text())
    record["inputs"]["model"] = "another"
    record["identity"] = runs.identity_of(record)
    (copy / "config.json").write_text(json.dumps(record))
    with pytest.raises(UserError, match="started from random .* say with --model"):
        trained.starting_model(runs.Run(copy))
    with pytest.raises(UserError, match=r"was made from reward-\w+, which is not beside it"):
        trained.upstream(runs.Run(copy), "reward")


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("samples.jsonl", {"rated": None}, "samples.jsonl, line 1: 'rated' is None"),
        ("samples.jsonl", {"prompt": ["p"]}, "samples.jsonl, line 1: 'prompt' is"),
        ("config.json", {"inputs": {"reward": 5}}, "input 'reward' is 5"),
        ("config.json", {"about": {"model": {"run": 5}}}, "about.model is {'run': 5}"),
        ("config.json", {"about": {"model": {"name": "random"}}}, "about.model is"),
    ],
)
def test_a_value_of_another_kind_in_the_files_of_a_run_is_named(
    results, tmp_path, capsys, name, change, message
):
    stage, command = ("reward", "export") if name == "config.json" else ("evaluate", "rate")
    copy = shutil.copytree(directory(results, stage), tmp_path / "copy")
    first, _, rest = (copy / name).read_text().partition("\n" if name[0] == "s" else "\0")
    row = json.loads(first) | change
    if "inputs" in row:
        row["identity"] = runs.identity_of(row)
        summary = json.loads((copy / "summary.json").read_text()) | {"identity": row["identity"]}
        (copy / "summary.json").write_text(json.dumps(summary))
    (copy / name).write_text(json.dumps(row) + "\n" + rest)
    with pytest.raises(SystemExit) as stopped:
        main([command, str(copy)])
    said = capsys.readouterr().err
    assert stopped.value.code == 2 and message in said and said.count("\n") == 1


def test_a_run_of_a_gan_has_no_language_model(tmp_path):
    gan = runs.ensure("gan", CFG, lambda run: run.finish(), inputs={"images": "x"}, root=tmp_path)
    with pytest.raises(UserError, match="stage 'gan', which has no language model"):
        trained.starting_model(gan)


def test_the_policy_of_a_run_is_the_one_that_was_saved(results, model):
    run = runs.Run(next(results.glob("ppo-lora-*")))
    found = trained.policies(trained.policy_runs(run), model)["ppo-lora"][1]
    start = ppo_training.untrained(model, CFG)
    expected = start._replace(trainable=jax.tree.map(lambda x: x + 0.3, start.trainable)).decoder()
    for one, other in zip(*map(jax.tree.leaves, (found, expected[1])), strict=True):
        np.testing.assert_array_equal(one, other)


def test_runs_are_listed_shown_compared_and_removed(results, tmp_path, capsys):
    shutil.copytree(results, tmp_path / "copies")
    one, other = (directory(tmp_path / "copies", stage) for stage in ("ppo-lora", "reward"))
    for action in (["list", "copies"], ["show", one], ["compare", one, other]):
        main(["runs", *action])
    said = capsys.readouterr().out
    assert "copies\nrun" in said and "\n3 runs, " in said and "\nresponse_tokens: 5\n" in said
    main(["runs", "remove", one, "--yes"])
    assert len(list((tmp_path / "copies").iterdir())) == 2

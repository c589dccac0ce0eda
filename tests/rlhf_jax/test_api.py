"""The public names: what they promise, that they do it, and what they say of bad input."""

import dataclasses
import inspect
import json
import os
import pydoc
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from flax import nnx

import rlhf_jax
from experiment_runs import devices
from experiment_runs.checkpoints import save_weights
from experiment_runs.errors import UserError
from experiment_runs.run import ensure
from rlhf_jax import api, trained
from rlhf_jax.__main__ import main
from rlhf_jax.config import PPOConfig, RewardConfig
from rlhf_jax.data.preferences import preference_posts
from rlhf_jax.evaluation.response_statistics import DESCRIBED
from rlhf_jax.export.huggingface import export_policy
from rlhf_jax.ppo.rewards import function_rewards
from rlhf_jax.pretrained.model import model_fingerprint
from rlhf_jax.reward_model import model as reward_models

ROOT = Path(__file__).resolve().parent.parent.parent
SIGNATURES = {
    "load": "model, *, precision='auto'",
    "train_reward_model": "model, pairs, *, config=None, out=None, on_step=None",
    "train_policy": "model, prompts, *, reward, config=None, out=None, on_step=None, "
    "reward_name=''",
    "generate": "model, prompts, *, prompt_tokens=256, response_tokens=128, temperature=1.0, "
    "seed=0, batch=32",
    "evaluate": "models, prompts, *, rewards, config=None, prompt_tokens=256, response_tokens=128",
}
CFG = PPOConfig(
    prompts=2, batch=2, forward_batch=2, passes=1, inner_epochs=1, prompt_tokens=96,
    response_tokens=4,
)  # fmt: skip
DIALOGUE = [
    {"role": "user", "content": "one"},
    {"role": "assistant", "content": "two"},
    {"role": "user", "content": "three"},
]
SCORE = "self, prompts, responses, *, batch=16"


def count(prompts, responses):
    """Characters of each response."""
    return [float(len(response)) for response in responses]


def parameters(function):
    found = inspect.signature(function)
    bare = [p.replace(annotation=inspect.Parameter.empty) for p in found.parameters.values()]
    text = str(found.replace(parameters=bare, return_annotation=inspect.Signature.empty))
    return text.removeprefix("(").removesuffix(")")


def test_the_signatures_of_the_public_names_are_what_callers_rely_on():
    assert {name: parameters(getattr(rlhf_jax, name)) for name in SIGNATURES} == SIGNATURES
    assert parameters(rlhf_jax.TrainedRewardModel.score) == SCORE
    assert {*SIGNATURES} < {*rlhf_jax.__all__} <= {*dir(rlhf_jax)}


def test_the_documentation_of_the_package_names_every_function_with_its_arguments():
    text = pydoc.plain(pydoc.render_doc(rlhf_jax))
    for name in SIGNATURES:
        assert f"{name}(" in text
        assert "Raises:" in getattr(rlhf_jax, name).__doc__ or name == "generate"


def test_importing_the_package_imports_no_library_that_takes_time():
    code = "import sys, rlhf_jax; print({'jax', 'flax', 'transformers', 'pandas'} & {*sys.modules})"
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert found.stdout.strip() == "set()"
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        _ = rlhf_jax.trian


def test_a_policy_is_not_trained_twice_and_another_reward_is_another_run(model, tmp_path):
    def short(prompts, responses):
        return [-len(response) for response in responses]

    def long(prompts, responses):
        return [len(response) for response in responses]

    steps = []
    first, again, other = (
        rlhf_jax.train_policy(
            model, ["a", "b"], reward=reward, config=CFG, out=tmp_path,
            on_step=lambda step, row: steps.append((step, row["reward"])),
        )
        for reward in (short, short, long)
    )  # fmt: skip
    assert [step for step, _ in steps] == [1, 1] and steps[0][1] < 0 < steps[1][1]
    assert first.run.path == again.run.path != other.run.path
    assert rlhf_jax.generate(again, ["a"], response_tokens=4) == rlhf_jax.generate(
        first, ["a"], response_tokens=4
    )


def test_a_reward_that_cannot_be_told_from_others_needs_a_name(model, tmp_path):
    lock, calls = threading.Lock(), []

    def guarded(prompts, responses):
        with lock:
            calls.append((prompts, responses))
            return [0.0] * len(responses)

    options = {"reward": guarded, "config": CFG, "out": tmp_path}
    with pytest.raises(UserError, match="reads .*reward_name="):
        rlhf_jax.train_policy(model, ["a", DIALOGUE], **options)
    one = rlhf_jax.train_policy(model, ["a", DIALOGUE], **options, reward_name="guarded 1")
    names = [trained.reward_fingerprint(guarded, name) for name in ("guarded 1", "guarded 2")]
    assert names[0] != names[1]
    [(given, responses)] = calls
    assert all(prompt in ("a", DIALOGUE) for prompt in given) and DIALOGUE in given
    assert [*map(type, responses)] == [str, str]
    shown = {row["prompt"] for row in one.run.samples()}
    assert shown == {"a", "Human: one\n\nAssistant: two\n\nHuman: three"}


def test_prompts_are_texts_or_the_turns_of_dialogues():
    single = [{"role": "user", "content": "b"}]
    assert api.conversations([DIALOGUE, " kept as it is ", single]) == [
        (("user", "one"), ("assistant", "two"), ("user", "three")), " kept as it is ", "b",
    ]  # fmt: skip


@pytest.fixture
def trained_reward_model(model, tmp_path):
    """An untrained one, and a finished run that says to have trained it."""
    cfg = RewardConfig()

    def train(run):
        save_weights(run.checkpoints / "best", reward_models.initial(model, cfg.seed)[1])
        interval = {"value": 0.7, "low": 0.6, "high": 0.8, "count": 9}
        run.finish(
            scale={"offset": 0.0, "gain": 1.0}, accuracy=interval, length_correlation=0.1,
            baselines={"longer": {"accuracy": interval}},
        )  # fmt: skip

    root = tmp_path / "reward models"
    run = ensure(
        "reward", cfg, train, inputs={"model": model_fingerprint(model), "posts": "x"},
        about=api.about(model, root), root=root,
    )  # fmt: skip
    return trained.TrainedRewardModel(reward_models.load(run, model), model, run, cfg.max_tokens)


@pytest.mark.slow
def test_the_commands_find_what_a_program_of_ones_own_trained(
    trained_reward_model, tmp_path, monkeypatch, capsys
):
    """Also where the model was itself tuned before, and elsewhere than in this directory."""
    model = rlhf_jax.load("random")
    one = rlhf_jax.train_policy(
        model, ["a", DIALOGUE], reward={"rm": (trained_reward_model, 0.5), "length": (count, 1.0)},
        config=CFG, out=tmp_path / "policies",
    )  # fmt: skip
    two = rlhf_jax.train_policy(one, ["a", "b"], reward=count, config=CFG, out=tmp_path / "more")
    monkeypatch.chdir(tmp_path)
    for tuned, said in ((one, "\nppo (reward "), (two, "\nppo (cut off)\n")):
        questions = iter(["Why?", ""])
        monkeypatch.setattr("builtins.input", lambda prompt, left=questions: next(left))
        main(["chat", str(tuned.run.path)])
        assert said in capsys.readouterr().out.replace("\nppo\n", "\nppo (cut off)\n")
    for run in (one.run, two.run, trained_reward_model.run):
        main(["export", str(run.path), "--out", f"exported {run.path.name}"])
    again = rlhf_jax.load(f"exported {two.run.path.name}")
    assert model_fingerprint(again) == model_fingerprint(two)
    main(["generate", str(two.run.path), "--prompt", "Why?"])
    assert "\nppo" in capsys.readouterr().out


@pytest.mark.parametrize("prompt", ["", " ", [], [{"role": "assistant", "content": "a"}], 3])
def test_a_prompt_that_asks_nothing_is_told_with_its_number(prompt):
    with pytest.raises(UserError, match="prompt 2 "):
        api.conversations(["a", prompt])


def test_too_few_prompts_and_two_models_of_one_name_are_told(model):
    with pytest.raises(UserError, match="prompts=2000, but 1 are given; set prompts=1"):
        rlhf_jax.train_policy(model, ["a"], reward=lambda p, r: [0.0], config=PPOConfig())
    with pytest.raises(UserError, match="same name"):
        rlhf_jax.evaluate([model, model], ["a"], rewards={"r": lambda p, r: [0.0] * len(r)})


@pytest.mark.parametrize(
    "wrong", [{"temperature": -1.0}, {"temperature": float("nan")}, {"seed": -1}, {"batch": 0}]
)
def test_draws_that_are_impossible_are_refused(model, wrong):
    ((name, value),) = wrong.items()
    with pytest.raises(UserError, match=f"{name}={value}"):
        rlhf_jax.generate(model, ["one"], response_tokens=2, **wrong)


def test_a_ratio_of_scores_is_refused_for_pairs_without_scores(model):
    pair = {"prompt": "p", "chosen": "a", "rejected": "b"}
    with pytest.raises(UserError, match="min_score_ratio=2.0: these pairs have no scores"):
        rlhf_jax.train_reward_model(model, [pair], config=RewardConfig(min_score_ratio=2.0))


def test_a_model_is_loaded_in_the_company_that_the_environment_asks_for(monkeypatch):
    monkeypatch.setenv("RLHF_HOSTS", "10.0.0.1:4217/2/7")
    with pytest.raises(UserError, match="RLHF_HOSTS=10.0.0.1:4217/2/7: write auto"):
        rlhf_jax.load("random")


def test_one_prompt_in_place_of_a_list_is_told(model):
    for call in (
        lambda: rlhf_jax.generate(model, "Why?"),
        lambda: rlhf_jax.evaluate([model], "Why?", rewards={"count": count}),
        lambda: rlhf_jax.train_policy(model, "Why?", reward=count, config=CFG),
    ):
        with pytest.raises(UserError, match="prompts is 'Why\\?'; give a list of prompts"):
            call()


CONTAINERS = [list, tuple, iter, pd.Series, lambda texts: np.array(texts, object)]


@pytest.mark.parametrize("container", CONTAINERS)
def test_prompts_and_responses_come_in_any_container(model, trained_reward_model, container):
    asked = ["one", "two"]
    assert rlhf_jax.generate(model, container(asked), response_tokens=2) == rlhf_jax.generate(
        model, asked, response_tokens=2
    )
    assert trained_reward_model.score(container(asked), container(["a", "b"])) == (
        trained_reward_model.score(asked, ["a", "b"])
    )


def test_what_is_no_list_of_responses_is_told(trained_reward_model):
    for responses, told in (("text", "responses is 'text'"), (["a"], "2 prompts but 1 responses")):
        with pytest.raises(UserError, match=told):
            trained_reward_model.score(["one", "two"], responses)
    with pytest.raises(UserError, match="response 2 is None"):
        trained.texts(["a", None])


def test_a_response_is_read_whole_and_alone(trained_reward_model):
    """Where it fits; what stands beside it in the call changes nothing."""
    long = "a" * 300
    ends = trained_reward_model.score(["p"] * 3, [long, f"{long}zzz", f"{long}bad"])
    assert len({*ends}) == 3
    asked = "a long question " * 30
    alone = trained_reward_model.score([asked], ["short"])
    beside = trained_reward_model.score([asked, "b"], ["short", long])
    assert beside[0] == pytest.approx(alone[0], abs=1e-5)
    with pytest.warns(UserWarning, match="1 responses are cut to"):
        trained_reward_model.score(["p"], ["a" * 600])


def test_a_dialogue_in_one_text_is_what_it_is_in_preferences():
    text = "\n\nHuman: one\n\nAssistant: two\n\nHuman: three\n\nAssistant:"
    assert api.conversations([text]) == api.conversations([DIALOGUE])
    assert api.conversations(["How do I greet a Human: by name?"])[0].startswith("How")


def test_what_is_no_list_of_prompts_models_or_rewards_is_told(model):
    frame = pd.DataFrame({"prompt": ["a"]})
    options = {"rewards": {"count": count}, "response_tokens": 2}
    for call, told in (
        (
            lambda: rlhf_jax.generate(model, frame),
            "prompts is .*; give a list of prompts, or a col",
        ),
        (lambda: rlhf_jax.generate(model, ["a"], response_tokens=0), "response_tokens=0 must be"),
        (lambda: rlhf_jax.evaluate([model], [], **options), "no prompts"),
        (
            lambda: rlhf_jax.evaluate([model], ["a"], rewards={"tokens": count, "kl": count}),
            "rewards named kl, tokens, as other columns are",
        ),
        (lambda: rlhf_jax.train_reward_model(model, {}), "pairs is a mapping of"),
        (lambda: rlhf_jax.train_reward_model(model, "pairs.jsonl"), "pairs.jsonl: no such folder"),
    ):
        with pytest.raises(UserError, match=told):
            call()


def test_one_model_and_one_reward_need_no_names(model):
    options = {"response_tokens": 2, "config": rlhf_jax.EvaluationConfig(resamples=100)}
    one = rlhf_jax.evaluate(model, ["a", "b"], rewards=count, **options)
    pd.testing.assert_frame_equal(
        one, rlhf_jax.evaluate([model], ["a", "b"], rewards={"reward": count}, **options)
    )
    assert [*one.columns[:3]] == ["reward", "reward_low", "reward_high"]
    assert [*one.columns[3:]] == [*DESCRIBED]


def test_pairs_are_read_where_they_are(tmp_path, monkeypatch):
    rows = [{"prompt": f"p{n}", "chosen": f"yes {n}", "rejected": f"no {n}"} for n in range(3)]
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert preference_posts("~/pairs.jsonl") == preference_posts(rows)


def test_a_reward_that_keeps_notes_is_told_to_take_a_name(model, tmp_path):
    notes = {}

    def noted(prompts, responses):
        return [notes.setdefault(text, float(len(text))) for text in responses]

    options = {"reward": noted, "config": CFG, "out": tmp_path}
    with pytest.warns(UserWarning, match="changes what it reads.*reward_name="):
        rlhf_jax.train_policy(model, ["a", "b"], **options)
    notes.clear()
    rlhf_jax.train_policy(model, ["a", "b"], **options, reward_name="noted")


def test_a_model_is_saved_once_and_over_nothing_else(model, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    tuned = rlhf_jax.train_policy(model, ["a", "b"], reward=count, config=CFG, out="~/runs")
    for _ in range(2):
        tuned.save("~/saved")
    assert model_fingerprint(rlhf_jax.load("~/saved")) == model_fingerprint(tuned)
    assert {path.name for path in tmp_path.iterdir()} == {"runs", "saved"}
    index = tmp_path / "saved" / "model.safetensors.index.json"
    index.write_text("{}")  # of a model in several files, which would be read in place of this one
    with pytest.raises(UserError, match="saved: is there already; name another folder"):
        tuned.save(tmp_path / "saved")
    assert index.exists()
    with pytest.raises(UserError, match=r"a run, not a model; .* export"):
        rlhf_jax.load(tuned.run.path)


def test_a_reward_model_s_method_is_a_reward_on_several_devices(
    model, trained_reward_model, tmp_path
):
    """Whose parameters then lie on all of them."""
    export_policy(nnx.merge(model.definition, model.state), model, tmp_path / "model", {})
    loaded = rlhf_jax.load(tmp_path / "model")
    frozen = reward_models.FrozenRewardModel(
        *nnx.split(nnx.merge(*reward_models.initial(loaded, seed=0)))
    )
    reward_model = dataclasses.replace(trained_reward_model, frozen=frozen, pretrained=loaded)
    with devices.placement():
        assert devices.parted()
        found = function_rewards({"rm": reward_model.score}, ["one", "two"], ["a", "b"])
    np.testing.assert_allclose(found["rm"], reward_model.score(["one", "two"], ["a", "b"]), 1e-5)


def test_models_of_other_tokenizers_are_not_compared(model):
    other = dataclasses.replace(model, name="other", tokenizer=dataclasses.replace(
        model.tokenizer, ends=(*model.tokenizer.ends, 3)
    ))  # fmt: skip
    for models in ([model, other], []):
        with pytest.raises(UserError, match="evaluate: give one model or more, all with the same"):
            rlhf_jax.evaluate(models, ["one"], rewards={"count": count})

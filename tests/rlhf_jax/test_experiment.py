"""What every stage is given, on small local data; nothing is trained."""

import dataclasses
import functools
import json

import pytest

from experiment_runs import run as runs
from experiment_runs.errors import UserError
from rlhf_jax import experiment, profiles
from rlhf_jax.data import preferences
from rlhf_jax.data.splits import overlap
from rlhf_jax.data.tables import normalised
from rlhf_jax.experiment import Experiment
from rlhf_jax.reward_model import training as reward_training


@pytest.fixture(autouse=True)
def nothing_is_trained(monkeypatch, tmp_path):
    """Every stage is finished at once; what identifies its run is real."""

    def ensure(stage, cfg, train, **options):
        def finish(run):
            run.log(step=1, loss=0.5)
            run.finish()

        return runs.ensure(stage, cfg, finish, root=tmp_path, **options)

    monkeypatch.setattr(experiment, "ensure", ensure)


@pytest.fixture(scope="module")
def data_dir(local_data):
    return local_data()


def changed(data_dir, **changes):
    """Profile tiny with other values in its parts, e.g. `reward={"seed": 1}`."""
    profile = profiles.tiny()
    parts = {
        name: dataclasses.replace(getattr(profile, name), **values)
        for name, values in changes.items()
    }
    return Experiment(profile=dataclasses.replace(profile, **parts), data_dir=data_dir)


def differing_inputs(stage, *experiments):
    """Names of the inputs in which a stage's runs differ."""
    one, other = (experiment.run(stage).record["inputs"] for experiment in experiments)
    assert set(one) == set(other)
    return {name for name in one if one[name] != other[name]}


@pytest.mark.parametrize("train_pairs", [9, 47, None])
def test_parts_share_no_text_whatever_training_leaves_to_the_second(data_dir, train_pairs):
    """A post is in one part; what is in none has a text in common with what is trained on."""
    made = changed(data_dir, reward={"train_pairs": train_pairs})
    parts = made.posts
    assert set(parts) == {"train", "second_reward", "validation", "test"} and all(parts.values())
    assert overlap(parts) == 0
    assert sum(len(post.pairs) for post in parts["train"]) >= (train_pairs or 100)
    kept = {post.post_id for part in parts.values() for post in part}
    for post in preferences.posts(made.preferences[0], max_pairs_per_post=None, seed=0):
        assert post.post_id in kept or overlap({"train": parts["train"], "lost": [post]})


def test_reward_models_learn_from_other_posts_and_are_tested_on_the_same(data_dir):
    made = changed(data_dir, reward={"train_pairs": 47})
    reward, second = made._parts("reward"), made._parts("second_reward")
    counts = [sum(len(post.pairs) for post in part["train"]) for part in (reward, second)]
    assert counts == [47, 24]
    assert (reward["validation"], reward["test"]) == (second["validation"], second["test"])
    assert overlap(reward | {"second_reward": second["train"]}) == 0


@pytest.mark.parametrize(("messages", "added"), [(60, 0), (30, 10)])
def test_no_unseen_prompt_is_trained_on(local_data, messages, added):
    train, unseen, source = changed(local_data(messages=messages)).prompts
    texts = [{normalised(prompt.text) for prompt in own} for own in (train, unseen)]
    assert [len(own) for own in texts] == [len(train), len(unseen)] == [24, 16]
    assert not texts[0] & texts[1]
    assert not {prompt.tree_id for prompt in train} & {prompt.tree_id for prompt in unseen}
    assert sum(prompt.origin == "preferences" for prompt in train) == added
    assert {prompt.origin for prompt in unseen} == {"messages"}
    assert ("questions of the preference data added" in source.note) == bool(added)


def test_more_unseen_prompts_than_there_are_is_an_error(data_dir):
    with pytest.raises(UserError, match="too few for 1000 to evaluate and 24 to train on"):
        changed(data_dir, evaluation={"prompts": 1000}).run("evaluate")


def test_other_unseen_prompts_make_another_evaluation_of_the_same_policies(data_dir):
    few, many = (
        changed(data_dir),
        changed(data_dir, evaluation={"prompts": 20}),
    )
    assert differing_inputs("evaluate", few, many) == {"prompts"}


@pytest.mark.parametrize("change", [{"seed": 1}, {"train_pairs": 9}])
def test_the_second_reward_model_knows_when_the_other_leaves_it_other_posts(data_dir, change):
    """Its own configuration is the same."""
    one, other = changed(data_dir), changed(data_dir, reward=change)
    assert differing_inputs("second_reward", one, other) == {"posts"}
    assert one.run("second_reward").identity != other.run("second_reward").identity


def test_another_reward_model_makes_other_policies_and_leaves_the_second_alone(data_dir):
    one, other = (
        changed(data_dir),
        changed(data_dir, reward={"learning_rate": 0.1}),
    )
    assert differing_inputs("ppo-lora", one, other) == {"reward"}
    assert differing_inputs("evaluate", one, other) == {"reward", "ppo-full", "ppo-lora"}


def test_a_function_of_ones_own_is_called_with_every_step(data_dir):
    seen = []
    made = dataclasses.replace(changed(data_dir), on_step=lambda step, row: seen.append(step))
    made.run("ppo-lora")
    assert seen == [1, 1]  # of the reward model, and of the policy


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"reward": {"max_tokens": 40}}, "RewardConfig.max_tokens=40 is too short for both"),
        ({"second_reward": {"max_tokens": 40}}, "RewardConfig.max_tokens=40 is too short for both"),
        ({"reward": {"reference_samples": 1}}, "reference_samples"),
        ({"ppo": {"batch": 9, "forward_batch": 9}}, "PPOConfig.batch=9 cannot be divided over 2"),
        ({"lora": {"forward_batch": 1}}, "PPOConfig.forward_batch=1 cannot be divided over 2"),
        ({"ppo": {"prompt_tokens": 4}}, "prompt_tokens=4 leaves no room"),
        ({"second_reward": {"reference_prompt_tokens": 4}}, "prompt_tokens=4 leaves no room"),
        ({"dpo": {"max_tokens": 40}}, "train pairs fit into DPOConfig.max_tokens=40"),
        ({"dpo": {"forward_pairs": 1}}, "DPOConfig.forward_pairs=1 cannot be divided over 2"),
    ],
    ids=str,
)
def test_what_a_later_stage_would_refuse_is_told_before_the_first(data_dir, changes, told):
    _ = changed(data_dir).checked
    with pytest.raises(UserError, match=told):
        _ = changed(data_dir, **changes).checked


@pytest.mark.parametrize("part", [0, 1], ids=["trained on", "unseen"])
def test_a_dialogue_that_the_template_cannot_write_is_told_before_the_first_stage(data_dir, part):
    """It is the last of the prompts."""
    made = changed(data_dir)
    turns = (("user", "a"), ("assistant", "b"), ("user", "c<|im_end|>"))
    made.prompts[part][-1] = dataclasses.replace(made.prompts[part][-1], turns=turns)
    with pytest.raises(UserError, match="holds '<.im_end.>', which only the chat template"):
        _ = made.checked


def test_a_stage_is_trained_only_when_the_inputs_of_all_are_right(data_dir, tmp_path, monkeypatch):
    """The reward model's own inputs are; those of the policies, which come later, are not."""
    ensure = functools.partial(runs.ensure, root=tmp_path)
    monkeypatch.setattr(experiment, "ensure", ensure)
    made = changed(data_dir, ppo={"prompt_tokens": 4})
    monkeypatch.setattr(reward_training, "train_on_posts", lambda *args: pytest.fail("trained"))
    with pytest.raises(UserError, match="prompt_tokens=4 leaves no room"):
        made.run("reward")


def test_an_unknown_stage_is_an_error(data_dir, tmp_path):
    with pytest.raises(
        UserError, match="'ppo-half': unknown; choose one of reward, second_reward, p"
    ):
        changed(data_dir).run("ppo-half")
    assert not any(tmp_path.iterdir())  # nothing was trained on the way


def test_other_preferences_and_prompts_go_before_the_folder_of_data(
    data_dir, tmp_path, monkeypatch
):
    pairs, questions = tmp_path / "pairs.jsonl", tmp_path / "questions.jsonl"
    rows = [
        {"prompt": f"Question {i}?", "chosen": f"Yes, {i}.", "rejected": f"No, {i}."}
        for i in range(300)
    ]
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows))
    questions.write_text("".join(json.dumps({"text": f"What is {i}?"}) + "\n" for i in range(90)))
    for name, value in {
        "PROFILE": "tiny", "DATA_DIR": data_dir, "PREFERENCES": pairs, "PROMPTS": questions,
    }.items():  # fmt: skip
        monkeypatch.setenv(f"RLHF_{name}", str(value))
    experiment.from_environment.cache_clear()
    made = experiment.from_environment()
    experiment.from_environment.cache_clear()
    assert made.sources["preferences"].name == "pairs.jsonl"
    assert made.sources["prompts"].name == "questions.jsonl"
    assert all(made.posts.values())
    trained, unseen, _ = made.prompts
    assert {prompt.text for prompt in trained + unseen} <= {f"What is {i}?" for i in range(90)}
    assert made.run("reward").about["preferences"]["rows"] == 300


def test_what_a_shared_reply_costs_and_what_nearly_repeats_is_said(tmp_path, data_dir):
    for split, count in (("train", 260), ("validation", 30), ("test", 30)):
        rows = [
            {"prompt": f"Question {split} {i}?", "chosen": f"Yes, {split} {i}.", "rejected": no}
            for i in range(count)
            for no in (f"No, {split} {i}.", "Thanks!")
        ]
        path = tmp_path / f"{split}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    made = dataclasses.replace(changed(data_dir), pairs_from=str(tmp_path))
    assert [len(made.division[0][name]) for name in ("validation", "test")] == [30, 30]
    assert overlap(made.posts) == 0
    said = made.run("reward").about
    assert said["preferences"]["note"] == (
        "290 replies, 290 pairs and 0 posts left out, because two parts would share a text"
    )
    assert "unseen ones nearly repeat one that is trained on" in said["prompts"]["note"]


def test_the_precision_is_resolved_before_a_run_is_identified_and_recorded(monkeypatch):
    """On another machine the same run is the one of the precision that it was made in."""
    found = {}
    for named in ("float32", "mixed"):
        monkeypatch.setenv("RLHF_PRECISION", named)
        for asked in ("auto", named):
            profile = dataclasses.replace(profiles.profile("tiny"), precision=asked)
            one = experiment.Experiment(profile=profile)
            found[named, asked] = one.model_identity
            assert one.pretrained.config.dtype == named
        assert experiment.from_environment.__wrapped__("tiny").profile.precision == named
    assert found["float32", "auto"] == found["float32", "float32"]
    assert found["mixed", "auto"] == found["mixed", "mixed"] != found["float32", "auto"]

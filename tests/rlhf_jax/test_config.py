import dataclasses
import json

import jaxtyping
import pytest

from experiment_runs import assignment
from experiment_runs.errors import UserError
from experiment_runs.files import encode, read_json
from experiment_runs.settings import RESULTS
from gan_jax import config as gan_config
from rlhf_jax import config, profiles
from rlhf_jax.config import EvaluationConfig, PPOConfig, RewardConfig

REFERENCE = RESULTS / "reference"


@pytest.fixture
def unchecked_types():
    """As outside of tests, where nothing but the configuration itself checks its fields."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.mark.parametrize(
    "kind, wrong, named",
    [
        (RewardConfig, {"learning_rate": 0.0}, "learning_rate=0.0"),
        (RewardConfig, {"batch_pairs": -1}, "batch_pairs=-1"),
        (RewardConfig, {"margin": -0.5}, "margin=-0.5"),
        (RewardConfig, {"min_score_ratio": 0.5}, "min_score_ratio=0.5"),
        (RewardConfig, {"loss": "mse"}, "loss=mse .*hinge, logistic"),
        (RewardConfig, {"reference_samples": 0}, "reference_samples=0"),
        (RewardConfig, {"reference_response_tokens": 0}, "reference_response_tokens=0"),
        (RewardConfig, {"train_pairs": 0}, "train_pairs=0"),
        (RewardConfig, {"weight_decay": -0.1}, "weight_decay=-0.1"),
        (RewardConfig, {"learning_rate": float("nan")}, "learning_rate=nan"),
        (RewardConfig, {"warmup_fraction": 2.0}, "warmup_fraction=2.0"),
        (RewardConfig, {"seed": -1}, "seed=-1"),
        (PPOConfig, {"seed": 10**20}, "seed=1000"),
        (PPOConfig, {"seed": 1e20}, "seed=1e.20 .*int"),
        (PPOConfig, {"sample_every": 0}, "sample_every=0"),
        (PPOConfig, {"ratio_clip": -0.2}, "ratio_clip=-0.2"),
        (PPOConfig, {"value_clip": -0.2}, "value_clip=-0.2"),
        (PPOConfig, {"value_weight": -1.0}, "value_weight=-1.0"),
        (PPOConfig, {"kl_weight": float("inf")}, "kl_weight=inf"),
        (PPOConfig, {"approx_kl_limit": 0.0}, "approx_kl_limit=0.0"),
        (PPOConfig, {"learning_rate": float("inf")}, "learning_rate=inf"),
        (PPOConfig, {"batch": 64.0}, "batch=64.0 .*int"),
        (EvaluationConfig, {"temperature": float("nan")}, "temperature=nan"),
        (EvaluationConfig, {"seed": -1}, "seed=-1"),
        (EvaluationConfig, {"response_tokens": 0}, "response_tokens=0"),
        (PPOConfig, {"batch": 10, "forward_batch": 4}, "batch=10.*forward_batch=4"),
        (PPOConfig, {"prompts": 8}, "prompts=8 .*batch=64"),
        (PPOConfig, {"temperature": 0.0}, "temperature=0.0"),
        (PPOConfig, {"gae_decay": 1.5}, "gae_decay"),
        (PPOConfig, {"inner_epochs": 0}, "inner_epochs=0"),
        (EvaluationConfig, {"prompts": 2}, "rated_prompts"),
    ],
)
def test_what_cannot_be_is_rejected_naming_field_and_value(unchecked_types, kind, wrong, named):
    with pytest.raises(UserError, match=named):
        kind(**wrong)


def test_a_precision_that_there_is_not_is_rejected_by_name(unchecked_types):
    with pytest.raises(UserError, match="Profile.precision=float16 .*float32, mixed"):
        dataclasses.replace(profiles.profile("tiny"), precision="float16")


def test_an_unknown_profile_is_answered_with_those_there_are():
    with pytest.raises(UserError, match="PROFILE=fast.*tiny, cpu, study, assignment"):
        profiles.profile("fast")


@pytest.mark.parametrize("name", profiles.PROFILES)
def test_the_variants_of_a_profile_differ_in_adapters_and_learning_rate_alone(name):
    profile = profiles.profile(name)
    assert profile.name == name
    rates = {"lora": profile.lora.lora, "learning_rate": profile.lora.learning_rate}
    assert dataclasses.replace(profile.ppo, **rates) == profile.lora
    assert profile.ppo.lora is None and profile.lora.lora is not None


@pytest.mark.parametrize("change", [{"max_pairs_per_post": 3}, {"min_score_ratio": 2.0}])
def test_both_reward_models_read_the_same_pairs_of_a_post(change):
    profile = profiles.profile("tiny")
    with pytest.raises(UserError, match=f"Profile.second_reward.{next(iter(change))}"):
        dataclasses.replace(
            profile, second_reward=dataclasses.replace(profile.second_reward, **change)
        )


def test_the_assignment_profile_keeps_to_the_protocol_in_assignment_toml():
    profile = profiles.profile("assignment")
    parts = {
        "reward": profile.reward, "ppo": profile.ppo, "lora": profile.lora.lora,
        "evaluation": profile.evaluation, "gan": gan_config.PROFILES["assignment"],
    }  # fmt: skip
    assert set(parts) | {"data"} == set(assignment.PROTOCOL)
    for part, cfg in parts.items():
        assert assignment.departures(part, dataclasses.asdict(cfg)) == [], part
    assert assignment.departures("ppo", dataclasses.asdict(profile.lora)) == []
    assert profile.evaluation.rated_prompts == assignment.ASSIGNMENT["ratings"]["prompts"] == 3
    low, high = assignment.KL_BAND
    assert low < profile.ppo.target_kl < high


def test_answers_are_whole_where_they_are_judged():
    """To their end, or 128 tokens."""
    for name in ("study", "assignment"):
        profile = profiles.profile(name)
        assert (profile.evaluation.response_tokens or profile.ppo.response_tokens) == 128


def test_the_steps_are_the_passes_times_the_whole_batches_of_a_pass():
    assert PPOConfig().steps == 5 * (2000 // 64) == 155


def test_every_estimator_is_given_as_many_episodes_and_steps():
    """So that the figure of reward against distance compares them and not their budgets."""
    policies = profiles.profile("study").policies
    estimators = [policies[f"ppo-{name}"] for name in ("full", "leave-one-out", "group")]
    assert [cfg.advantages for cfg in estimators] == ["gae", "leave-one-out", "group"]
    assert (
        len({(cfg.steps, cfg.batch, cfg.inner_epochs, cfg.learning_rate) for cfg in estimators})
        == 1
    )


@pytest.mark.parametrize("cfg", profiles.profile("study").policies.values())
def test_a_ppo_configuration_comes_back_from_a_run_as_it_was(cfg):
    assert config.ppo_config(json.loads(encode(dataclasses.asdict(cfg)))) == cfg


def test_the_configurations_of_committed_policies_can_still_be_read():
    stored = [read_json(path) for path in REFERENCE.glob("ppo-*/config.json")]
    cfgs = [config.ppo_config(record["config"]) for record in stored]
    assert {cfg.steps for cfg in cfgs} == {25} and len(cfgs) == 8


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"advantages": "group"}, "advantages='group' compares.*responses_per_prompt, 2 or more"),
        ({"responses_per_prompt": 5}, "responses_per_prompt=5 does not divide batch=64"),
        ({"responses_per_prompt": 0}, "responses_per_prompt=0"),
        ({"prompts": 15, "responses_per_prompt": 4}, "prompts=15 is less than the 16 of a step"),
    ],
)
def test_responses_to_a_prompt_must_fit_the_batch(changes, told):
    with pytest.raises(UserError, match=told):
        config.PPOConfig(**changes)
    assert config.PPOConfig(prompts=16, responses_per_prompt=4).steps == 5


CONFIGURATIONS = [
    config.LoRAConfig(), RewardConfig(), PPOConfig(), config.DPOConfig(), EvaluationConfig(),
    gan_config.GANConfig(), gan_config.EvidenceConfig(), profiles.tiny(),
]  # fmt: skip
SIZES = [
    (found, field.name)
    for found in CONFIGURATIONS
    for field in dataclasses.fields(found)
    if field.name != "seed" and str(field.type).startswith(("int", "<class 'int", "tuple[int"))
]


@pytest.mark.parametrize(
    "found, field", SIZES, ids=[f"{type(found).__name__}.{field}" for found, field in SIZES]
)
def test_a_size_of_a_thousand_million_is_refused_before_memory_is_taken(found, field):
    size = 10**9
    wrong = (size, 1, 1, 1) if isinstance(getattr(found, field), tuple) else size
    with pytest.raises(UserError, match=f"{field}=.*at most "):
        dataclasses.replace(found, **{field: wrong})


@pytest.mark.parametrize(
    "kind, wrong",
    [
        (RewardConfig, {"batch_rows": 4096, "max_tokens": 2**17}),
        (PPOConfig, {"batch": 8192, "forward_batch": 8192, "prompts": 8192, "prompt_tokens": 2048}),
        (PPOConfig, {"batch": 2**16, "forward_batch": 16, "prompts": 2**16}),
        (RewardConfig, {"reference_samples": 2**16}),
        (config.EvaluationConfig, {"batch": 2**16, "response_tokens": 2**17}),
        (config.DPOConfig, {"batch_pairs": 8192, "forward_pairs": 8192, "max_tokens": 4096}),
    ],
)
def test_sizes_that_no_memory_holds_together_are_refused(kind, wrong):
    with pytest.raises(UserError, match="a batch has .* tokens"):
        kind(**wrong)


@pytest.mark.parametrize(
    "kind, wrong, told",
    [
        (gan_config.GANConfig, {"momentum": 1.0}, "GANConfig.momentum=1.0 .*from 0 to below 1"),
        (gan_config.GANConfig, {"variance_decay": 1.0}, "variance_decay=1.0 is impossible"),
        (config.LoRAConfig, {"targets": ()}, "targets=.*one or more of q_proj"),
    ],
)
def test_what_would_train_nothing_or_divide_by_zero_is_refused(kind, wrong, told):
    with pytest.raises(UserError, match=told):
        kind(**wrong)


def test_a_batch_of_responses_as_long_as_the_policys_is_bounded_too():
    whole = profiles.profile("assignment")
    with pytest.raises(UserError, match="EvaluationConfig.batch=65536 is impossible: must be less"):
        dataclasses.replace(whole, evaluation=dataclasses.replace(whole.evaluation, batch=2**16))

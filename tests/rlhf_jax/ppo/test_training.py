"""The invariants that broke the peers, on the program that trains."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from experiment_runs.devices import over_devices, replicated
from rlhf_jax import objectives
from rlhf_jax.config import LoRAConfig, PPOConfig
from rlhf_jax.language_model import sampling
from rlhf_jax.language_model.sampling import Responses
from rlhf_jax.optimization.state import TrainState
from rlhf_jax.ppo import actor_critic, rollout
from rlhf_jax.ppo import training as ppo_training
from rlhf_jax.ppo.rollout import Frozen, Static
from rlhf_jax.ppo.update import advantages_and_returns, update
from rlhf_jax.pretrained.prompt_rows import prompt_rows
from rlhf_jax.pretrained.tensor_names import leaf_name
from rlhf_jax.reward_model import model as reward_models

CFG = PPOConfig(
    batch=8, forward_batch=8, passes=1, prompts=8, prompt_tokens=16, response_tokens=5,
    inner_epochs=3, approx_kl_limit=1e6, temperature=0.8,
)  # fmt: skip
# Two inner epochs that change nothing, then one whose change is minus the gradient.
STILL_THEN_GRADIENT = optax.sgd(lambda step: jnp.where(step % 3 == 2, 1.0, 0.0))


@pytest.fixture(scope="module")
def episodes(toy):
    """Prompts and sampled responses, one of which ended early."""
    tokens, mask, _ = prompt_rows(
        ["a", "bc", "dab", "", "h", "gg", "fade", "c"], toy.tokenizer, length=16
    )
    responses = sampling.sample(
        toy.state, jnp.asarray(tokens), jnp.asarray(mask), jax.random.split(jax.random.key(0), 8),
        CFG.temperature, decoder_def=toy.definition, length=5, end=toy.tokenizer.end,
        pad=toy.tokenizer.pad,
    )  # fmt: skip
    assert not bool(responses.mask.all()) and bool(responses.mask[:, 0].all())
    return jnp.asarray(tokens), jnp.asarray(mask), responses


def moved(toy, toy_reward_model, variant, seed=0, critic=True):
    """A policy some way from the reference, so that nothing is zero by chance."""
    built = actor_critic.build(toy, variant, seed=seed, critic=critic)
    leaves, structure = jax.tree.flatten(built.trainable)
    keys = jax.random.split(jax.random.key(5), len(leaves))
    noisy = [
        x + 0.05 * jax.random.normal(key, x.shape) for x, key in zip(leaves, keys, strict=True)
    ]
    built = built._replace(trainable=jax.tree.unflatten(structure, noisy))
    return built, Frozen(built.frozen, toy.state, {"reward": toy_reward_model.state})


def run_update(
    toy, toy_reward_model, episodes, cfg, *, optimizer=STILL_THEN_GRADIENT, spread=False
):
    """One step on given episodes: the change of what is trained, the metrics, the episodes."""
    built, frozen = moved(toy, toy_reward_model, cfg.lora, critic=cfg.has_critic)
    state = TrainState(built.trainable, optimizer.init(built.trainable), jnp.zeros((), jnp.int32))
    state = jax.tree.map(jnp.copy, state)
    static = Static(
        built.definition, toy.definition, (("reward", 1.0, toy_reward_model.definition),),
        optimizer, cfg, toy.tokenizer.end,
    )  # fmt: skip
    if spread:
        state, frozen, episodes = replicated(state), replicated(frozen), over_devices(episodes)
    after, metrics, scored = update(
        state, frozen, *episodes, {}, 0.3, jax.random.key(1), static=static
    )
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state))  # donated
    change = jax.tree.map(
        lambda a, b: np.asarray(a) - np.asarray(b), after.trainable, built.trainable
    )
    return change, ppo_training.to_row(metrics), scored


@pytest.fixture(scope="module")
def whole_batch(toy, toy_reward_model, episodes):
    """What every split into forward batches, padding and placement must agree with."""
    return run_update(toy, toy_reward_model, episodes, CFG)


def assert_same(found, expected):
    """Returns how far the gradients are apart, relative to their norm."""
    for name, value in expected[1].items():
        assert found[1][name] == pytest.approx(value, rel=1e-4, abs=1e-5), name
    pairs = [*zip(*map(jax.tree.leaves, (found[0], expected[0])), strict=True)]
    for ours, theirs in pairs:
        assert np.linalg.norm(ours - theirs) <= 1e-4 * np.linalg.norm(theirs) + 1e-6
    apart = sum(np.sum((ours - theirs) ** 2) for ours, theirs in pairs)
    return np.sqrt(apart / sum(np.sum(theirs**2) for _, theirs in pairs))


def test_an_update_that_changes_nothing_leaves_the_log_ratio_at_zero(whole_batch, measured):
    """`ratio_error` and `approx_kl` are those of the third epoch, after two at rate zero."""
    _, metrics, _ = whole_batch
    assert metrics["inner_epochs"] == 3
    for name in ("first_ratio_error", "first_approx_kl", "ratio_error", "approx_kl"):
        measured(f"{name.replace('_', ' ')} at rate 0", metrics[name], 1e-5)
    assert metrics["clip_fraction"] == 0
    assert metrics["kl"] > 1e-3  # the policy does differ from the reference


@pytest.mark.parametrize("forward_batch", [4, 1])
def test_log_ratio_metrics_and_gradients_are_those_of_every_split_into_forward_batches(
    toy, toy_reward_model, episodes, whole_batch, forward_batch, measured
):
    cfg = dataclasses.replace(CFG, forward_batch=forward_batch)
    found = run_update(toy, toy_reward_model, episodes, cfg)
    split = f"8 episodes in forward batches of {forward_batch}"
    measured(f"ratio error at rate 0, {split}", found[1]["ratio_error"], 1e-5)
    measured(f"gradients, {split} against the whole", assert_same(found, whole_batch), 1e-4)


def test_padding_before_and_after_changes_no_metric_and_no_gradient(
    toy, toy_reward_model, episodes, measured
):
    tokens, mask, responses = episodes
    wide = jnp.pad(tokens, ((0, 0), (3, 0)), constant_values=7), jnp.pad(mask, ((0, 0), (3, 0)))
    late = Responses(
        jnp.pad(responses.tokens, ((0, 0), (0, 2)), constant_values=9),
        jnp.pad(responses.mask, ((0, 0), (0, 2))),
        jnp.pad(responses.logprobs, ((0, 0), (0, 2))),
    )
    # A cut-off response would get its end two tokens later: let every response have ended.
    ended = ends_early(responses, toy.tokenizer.end), ends_early(late, toy.tokenizer.end)
    expected = run_update(toy, toy_reward_model, (tokens, mask, ended[0]), CFG)
    apart = assert_same(run_update(toy, toy_reward_model, (*wide, ended[1]), CFG), expected)
    measured("gradients with padding on both sides against none", apart, 1e-4)


def ends_early(responses, end):
    """The same responses with an end token in the place of their last token."""
    mask = np.asarray(responses.mask)
    tokens = np.asarray(responses.tokens).copy()
    tokens[np.arange(len(tokens)), mask.sum(axis=1) - 1] = end
    return responses._replace(tokens=jnp.asarray(tokens))


def test_two_devices_do_what_one_does(toy, toy_reward_model, episodes, whole_batch):
    assert_same(run_update(toy, toy_reward_model, episodes, CFG, spread=True), whole_batch)


def test_scored_logprobs_are_those_the_sampler_saw(episodes, whole_batch, measured):
    """The reference is the policy that sampled here, the trained one is some way from it."""
    *_, responses = episodes
    _, metrics, scored = whole_batch
    difference = jnp.abs(scored.reference_logprobs - responses.logprobs)[responses.mask].max()
    measured("scored against sampled logprobs (nats)", difference, 5e-6)
    apart = np.abs(np.asarray(scored.logprobs - responses.logprobs))[np.asarray(responses.mask)]
    assert metrics["logprob_error"] == pytest.approx(apart.max()) and apart.max() > 0.01
    assert metrics["logprob_error_mean"] == pytest.approx(apart.mean(), rel=1e-4)
    assert metrics["logprob_error_p99"] == pytest.approx(np.quantile(apart, 0.99), rel=1e-4)


def test_the_end_token_counts(toy, episodes, whole_batch, measured):
    _, metrics, scored = whole_batch
    tokens = np.asarray(scored.tokens[:, 16:])
    ended = (tokens == toy.tokenizer.end) & np.asarray(scored.mask)
    assert ended.any() and metrics["ended"] == pytest.approx(ended.any(axis=1).mean())
    ends = np.asarray(episodes[2].tokens) == toy.tokenizer.end
    first = ends & (ends.cumsum(axis=1) == 1)
    measured("end tokens outside the mask", (first & ~np.asarray(scored.mask)).sum(), 0)
    assert metrics["response_tokens"] == pytest.approx(np.asarray(episodes[2].mask).sum() / 8)


def test_the_reward_is_the_reward_model_s_alone_and_every_kl_is_what_it_says(
    toy, toy_reward_model, whole_batch
):
    _, metrics, scored = whole_batch
    mask = np.asarray(scored.mask)
    scorer = nnx.merge(*toy_reward_model)
    cut_off = mask[:, -1] & (np.asarray(scored.tokens)[:, -1] != toy.tokenizer.end)
    tokens = jnp.pad(scored.tokens, ((0, 0), (0, 1)), constant_values=toy.tokenizer.end)
    token_mask = jnp.concatenate([scored.token_mask, jnp.asarray(cut_off)[:, None]], axis=1)
    np.testing.assert_allclose(scored.reward, jax.jit(scorer)(tokens, token_mask), atol=1e-5)
    assert metrics["reward"] == pytest.approx(float(scored.reward.mean()), rel=1e-5)
    difference = np.asarray(scored.logprobs - scored.reference_logprobs)[mask]
    assert metrics["kl_k1"] == pytest.approx(difference.mean(), rel=1e-4)
    assert metrics["kl_k3"] == pytest.approx((np.expm1(-difference) + difference).mean(), rel=1e-3)
    per_sequence = np.where(mask, scored.kl, 0).sum(axis=1)
    assert metrics["kl"] == pytest.approx(per_sequence.sum() / mask.sum(), rel=1e-4)
    assert metrics["kl_sequence"] == pytest.approx(per_sequence.mean(), rel=1e-4)


def test_the_gradient_is_that_of_the_plain_loss_over_the_batch(toy, toy_reward_model, whole_batch):
    """Written once more from the paper, on the scores that the step computed."""
    change, metrics, scored = whole_batch
    mask = scored.mask
    cut_off = ~((scored.tokens[:, 16:] == toy.tokenizer.end) & mask).any(axis=1)
    rewards = objectives.token_rewards(
        scored.reward - CFG.missing_end_penalty * cut_off, scored.logprobs,
        scored.reference_logprobs, mask, kl_weight=0.3,
    )  # fmt: skip
    advantages = objectives.generalized_advantages(
        rewards, scored.values, mask, discount=CFG.discount, decay=CFG.gae_decay
    )
    returns = advantages + scored.values
    kept = np.asarray(advantages)[np.asarray(mask)]
    whitened = (advantages - kept.mean()) / kept.std()
    built, _ = moved(toy, toy_reward_model, None)

    @jax.jit
    @jax.grad
    def gradient(trainable):
        model = nnx.merge(built.definition, trainable, built.frozen)
        states, values = model.states_and_values(scored.tokens, scored.token_mask, 16)
        logs = jax.nn.log_softmax(model.decoder.logits(states) / CFG.temperature)
        logprobs = jnp.take_along_axis(logs, scored.tokens[:, 16:, None], axis=-1)[..., 0]
        surrogate = -whitened * jnp.exp(logprobs - scored.logprobs)
        squares = 0.5 * (values - returns) ** 2
        return jnp.where(mask, surrogate + CFG.value_weight * squares, 0.0).sum() / mask.sum()

    expected = jax.tree.leaves(gradient(built.trainable))
    for ours, theirs in zip(jax.tree.leaves(change), expected, strict=True):
        assert np.linalg.norm(ours + theirs) <= 1e-3 * np.linalg.norm(theirs) + 1e-6
    norm = np.sqrt(sum((np.asarray(x) ** 2).sum() for x in expected))
    assert metrics["gradient_norm"] == pytest.approx(norm, rel=1e-3)


def test_an_update_that_runs_away_ends_the_inner_epochs(toy, toy_reward_model, episodes):
    cfg = dataclasses.replace(CFG, approx_kl_limit=1e-3, inner_epochs=4)
    _, metrics, _ = run_update(toy, toy_reward_model, episodes, cfg, optimizer=optax.sgd(3.0))
    assert metrics["first_approx_kl"] < 1e-6 and metrics["approx_kl"] > 1e-3
    assert metrics["inner_epochs"] == 2


@pytest.mark.parametrize("limit", [1e-3, 1e6])
def test_the_learning_rate_goes_on_as_if_every_inner_epoch_had_run(
    toy, toy_reward_model, episodes, limit
):
    cfg = dataclasses.replace(CFG, approx_kl_limit=limit, inner_epochs=4)
    optimizer = optax.sgd(lambda step: jnp.where(step < 4, 1.0, 0.0))
    built, frozen = moved(toy, toy_reward_model, None)
    start = TrainState(built.trainable, optimizer.init(built.trainable), jnp.zeros((), jnp.int32))
    static = Static(
        built.definition, toy.definition, (("reward", 1.0, toy_reward_model.definition),),
        optimizer, cfg, toy.tokenizer.ends,
    )  # fmt: skip
    state, metrics, _ = update(
        jax.tree.map(jnp.copy, start), frozen, *episodes, {}, 0.3, jax.random.key(1), static=static
    )
    assert (metrics["inner_epochs"] < 4) == (limit < 1)
    schedule = state.opt_state[-1]
    assert int(schedule.count) == int(state.step) == 4


@pytest.mark.filterwarnings("ignore:overflow")
def test_an_update_that_leaves_no_finite_weights_is_told_and_not_saved(train_toy, tmp_path):
    """What the last update before the end of a run did, no metric shows."""
    with pytest.raises(FloatingPointError, match="step 1: .* not finite.*learning rate"):
        train_toy("full", tmp_path, passes=1, inner_epochs=1, learning_rate=1e39)
    assert not [*tmp_path.rglob("policy"), *tmp_path.rglob("summary.json")]


def test_the_optimizer_leaves_frozen_parameters_of_a_whole_tree_alone(toy):
    cfg = dataclasses.replace(CFG, lora=LoRAConfig())
    built = actor_critic.build(toy, cfg.lora, seed=0)
    whole = nnx.state(nnx.merge(*built))
    optimizer = ppo_training.ppo_optimizer(cfg)
    grads = jax.tree.map(lambda x: 100 * jnp.ones_like(x), whole)
    updates, _ = jax.jit(optimizer.update)(grads, optimizer.init(whole), whole)
    for path, change in jax.tree_util.tree_leaves_with_path(updates):
        name = leaf_name(path)
        assert bool(change.any()) == ("lora_" in name or name.startswith("value.")), name


def test_every_pass_takes_every_prompt_once_in_another_order():
    cfg = PPOConfig(prompts=12, batch=4, forward_batch=4, passes=2)
    drawn = [ppo_training.episode_prompts(cfg, 12, step).tolist() for step in range(cfg.steps)]
    first, second = sum(drawn[:3], []), sum(drawn[3:], [])
    assert sorted(first) == sorted(second) == list(range(12)) and first != second


def test_every_response_to_a_prompt_has_a_number_of_its_own():
    cfg = PPOConfig(
        prompts=12, batch=12, forward_batch=4, passes=2, responses_per_prompt=3,
        advantages="leave-one-out",
    )  # fmt: skip
    drawn = [ppo_training.episode_prompts(cfg, 12, step) for step in range(cfg.steps)]
    assert cfg.steps == 6 and sorted(sum(map(list, drawn[:3]), [])) == list(range(12))
    answered, numbers = ppo_training.numbered(drawn[0], 3)
    assert [*answered] == [i for i in drawn[0] for _ in range(3)]
    assert len({*numbers}) == 12 and [*numbers // 3] == [*answered]
    alone, same = ppo_training.numbered(drawn[0], 1)
    assert [*alone] == [*same] == [*drawn[0]]


def test_every_step_and_stream_has_a_key_of_its_own():
    key = jax.random.key(0)
    keys = [
        ppo_training.step_key(key, stream, step)
        for stream in (ppo_training.ROLLOUT, ppo_training.DROPOUT)
        for step in range(4)
    ]
    assert len({tuple(jax.random.key_data(k).tolist()) for k in keys}) == 8
    again = ppo_training.step_key(key, ppo_training.DROPOUT, 3)
    assert jax.random.key_data(again).tolist() == jax.random.key_data(keys[-1]).tolist()


# From here on: whole runs on the toy, whose reward model likes one letter.


def test_before_the_first_update_the_ratio_is_one_and_the_kl_zero(toy_run, measured):
    run, cfg = toy_run
    first = run.metrics().iloc[0]
    for name in ("kl", "kl_k1", "kl_k3", "kl_sequence"):
        measured(f"{name}, first step", abs(first[name]), 1e-5)
    # With adapters too: they are zero before the first update, whatever their dropout.
    measured("ratio error, first update", first["first_ratio_error"], 1e-5)
    measured("approximate KL, first update", first["first_approx_kl"], 1e-5)


def test_nothing_but_the_dropout_of_adapters_moves_the_first_ratio_of_a_step(toy_run):
    run, cfg = toy_run
    later = run.metrics()["first_ratio_error"].iloc[1:]
    if cfg.lora is None:
        assert later.max() < 1e-4
    else:
        assert later.min() > 1e-3


def test_the_optimum_is_found(toy_run, toy, toy_reward_model, best_token, measured):
    """The best response is four times the letter that the reward model likes."""
    run, cfg = toy_run
    tokens, mask, _ = prompt_rows(["ab", "hd"], toy.tokenizer, length=cfg.prompt_tokens)
    definition, state = ppo_training.tuned_decoder(run, cfg, toy)
    responses = sampling.sample(
        state, jnp.asarray(tokens), jnp.asarray(mask), jax.random.split(jax.random.key(0), 2), 0.0,
        decoder_def=definition, length=cfg.response_tokens, end=toy.tokenizer.end,
        pad=toy.tokenizer.pad,
    )  # fmt: skip
    wrong = (responses.tokens != best_token).sum()
    measured(f"wrong tokens of a toy's best policy, {run.stage}", wrong, 0)
    best = reward_models.response_rewards(
        toy_reward_model.state, jnp.asarray(tokens), jnp.asarray(mask), responses,
        definition=toy_reward_model.definition, end=toy.tokenizer.end,
    )  # fmt: skip
    rewards = run.metrics()["reward"]
    assert rewards.iloc[0] < 0.3 * float(best.min())
    assert rewards.tail(3).mean() > 0.9 * float(best.min())


def test_the_kl_of_a_step_sets_the_coefficient_of_the_next(toy_run):
    run, cfg = toy_run
    rows = run.metrics()
    assert rows["kl_weight"][0] == cfg.kl_weight
    for now, after in zip(rows.itertuples(), rows["kl_weight"][1:], strict=False):
        expected = objectives.next_kl_weight(
            now.kl_weight, now.kl, target=cfg.target_kl, gain=cfg.kl_gain
        )
        assert after == expected != now.kl_weight


def test_the_run_moves_only_what_its_variant_trains(toy_run, toy):
    run, cfg = toy_run
    definition, state = ppo_training.tuned_decoder(run, cfg, toy)
    start = dict(named(actor_critic.build(toy, cfg.lora, seed=cfg.seed).decoder()[1]))
    for name, leaf in named(state):
        should_move = cfg.lora is None or "lora_" in name
        assert bool((leaf != start[name]).any()) == should_move, name


def named(state):
    return [
        (leaf_name(path), np.asarray(x)) for path, x in jax.tree_util.tree_leaves_with_path(state)
    ]


def test_rewards_are_counted_in_classes_and_what_lies_outside_in_the_outermost():
    counts = rollout.histogram(jnp.asarray([-9.0, -4.0, 0.1, 0.2, 3.9, 50.0]))
    assert counts[0] == 2 and counts[-1] == 2 and counts[8] == 2 and sum(counts) == 6


def test_every_step_draws_other_responses(toy_run):
    run, _ = toy_run
    first_steps = run.metrics()[["reward", "reward_std"]].head(6)
    assert len(first_steps.drop_duplicates()) == 6


def test_an_interrupted_run_resumes_to_the_same_bits(
    toy_run, train_toy, toy, timeless, interruption, tmp_path
):
    finished, cfg = toy_run
    variant = "full" if cfg.lora is None else "lora"
    with interruption() as fragile:
        train_toy(
            variant, tmp_path, train=lambda run, *args: ppo_training.train(fragile(run), *args)
        )
    resumed, _ = train_toy(variant, tmp_path)
    assert timeless(resumed).equals(timeless(finished))
    assert resumed.samples() == finished.samples()
    ours, theirs = (ppo_training.tuned_decoder(run, cfg, toy)[1] for run in (resumed, finished))
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def test_samples_are_kept_as_text_with_their_reward(toy_run):
    run, cfg = toy_run
    samples = run.samples()
    expected = {1, 6, 11, 16, 21, 26, 31}
    assert {sample["step"] for sample in samples} == expected == {*range(1, cfg.steps + 1, 5)}
    assert all(set(sample) >= {"prompt", "response", "reward"} for sample in samples)
    assert samples[-1]["response"].count("c") >= 3 and samples[-1]["reward"] > samples[0]["reward"]


@pytest.mark.parametrize("advantages", ["leave-one-out", "group"])
def test_the_optimum_is_found_without_a_critic(train_toy, toy, best_token, tmp_path, advantages):
    run, cfg = train_toy("full", tmp_path, advantages=advantages, responses_per_prompt=4, passes=16)
    assert cfg.steps == 64
    rows = run.metrics()
    assert rows["reward"].iloc[0] < 0.3 * rows["reward"].max()
    samples = [row["response"] for row in run.samples()[-3:]]
    assert all(response.count("c") >= 3 for response in samples), samples
    assert not {"value_loss", "explained_variance"} & {*rows.columns}
    built = ppo_training.untrained(toy, cfg)
    assert not [name for name, _ in named(built.trainable) if name.startswith("value")]
    definition, state = ppo_training.tuned_decoder(run, cfg, toy)
    tokens, mask, _ = prompt_rows(["ab", "hd"], toy.tokenizer, length=cfg.prompt_tokens)
    responses = sampling.sample(
        state, jnp.asarray(tokens), jnp.asarray(mask), jax.random.split(jax.random.key(0)), 0.0,
        decoder_def=definition, length=4, end=toy.tokenizer.end, pad=toy.tokenizer.pad,
    )  # fmt: skip
    assert (responses.tokens == best_token).all()


def test_advantages_without_a_critic_are_equal_within_a_response_and_sum_to_zero_in_a_prompt(
    toy, toy_reward_model, episodes
):
    cfg = dataclasses.replace(CFG, advantages="leave-one-out", responses_per_prompt=4)
    _, metrics, scored = run_update(toy, toy_reward_model, episodes, cfg)
    assert scored.values is None and "value_loss" not in metrics
    rewards = jnp.where(scored.mask, 1.0, 0.0) * jnp.arange(8.0)[:, None]
    advantages, returns = advantages_and_returns(rewards, scored, cfg)
    assert returns is None
    mask, found = np.asarray(scored.mask), np.asarray(advantages)
    totals = np.asarray(rewards).sum(axis=1)
    for row in range(8):
        group = [other for other in range(row // 4 * 4, row // 4 * 4 + 4) if other != row]
        expected = totals[row] - totals[group].mean()
        np.testing.assert_allclose(found[row][mask[row]], expected, rtol=1e-5)
        assert not found[row][~mask[row]].any()

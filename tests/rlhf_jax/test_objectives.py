"""The equations against scalar loops and closed forms, under strict dtype promotion."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax import objectives


@pytest.fixture(autouse=True)
def strict_dtypes():
    with jax.numpy_dtype_promotion("strict"):
        yield


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def response_masks(seed, batch, time):
    """Each row one run of True, of any length and anywhere; the first row is empty."""
    rng = np.random.default_rng(seed)
    starts, ends = np.sort(rng.integers(0, time + 1, (2, batch)), axis=0)
    ends[0] = starts[0]
    columns = np.arange(time)
    return jnp.asarray((columns >= starts[:, None]) & (columns < ends[:, None]))


def loop_advantages(rewards, values, mask, discount, decay):
    """Equation 16 of Schulman et al. (2016), one response at a time, forwards."""
    found = np.zeros(rewards.shape)
    for row in range(len(rewards)):
        steps = np.flatnonzero(mask[row])
        for i, t in enumerate(steps):
            for ahead, later in enumerate(steps[i:]):
                after = values[row, later + 1] if later != steps[-1] else 0.0
                delta = rewards[row, later] + discount * after - values[row, later]
                found[row, t] += (discount * decay) ** ahead * delta
    return found


@pytest.mark.parametrize("discount, decay", [(1.0, 0.95), (0.9, 0.5), (1.0, 1.0)])
def test_advantages_equal_a_scalar_loop(discount, decay, measured):
    rewards, values, mask = normal(0, 12, 9), normal(1, 12, 9), response_masks(2, 12, 9)
    found = objectives.generalized_advantages(rewards, values, mask, discount=discount, decay=decay)
    expected = loop_advantages(*map(np.asarray, (rewards, values, mask)), discount, decay)
    measured("advantages against a scalar loop", np.abs(found - expected).max(), 1e-5)


def test_a_learned_reward_of_1_73_reaches_the_advantages_as_1_73(measured):
    mask = jnp.asarray([[False, True, True, False], [True, True, True, True]])
    still = jnp.zeros((2, 4))
    rewards = objectives.token_rewards(jnp.asarray([1.73, -0.4]), still, still, mask, kl_weight=0.1)
    np.testing.assert_allclose(rewards, [[0, 0, 1.73, 0], [0, 0, 0, -0.4]], rtol=1e-6)
    advantages = objectives.generalized_advantages(rewards, still, mask, discount=1.0, decay=1.0)
    error = np.abs(advantages - np.array([[0, 1.73, 1.73, 0], [-0.4] * 4])).max()
    measured("a learned reward of 1.73, in the advantages", error, 1e-6)


def test_every_token_pays_for_its_log_ratio_and_nothing_outside_the_response_does():
    logprobs, reference, mask = normal(0, 6, 5), normal(1, 6, 5), response_masks(3, 6, 5)
    reward = normal(2, 6)
    found = objectives.token_rewards(reward, logprobs, reference, mask, kl_weight=0.3)
    penalty = 0.3 * np.where(mask, logprobs - reference, 0)
    received = np.asarray(found) + penalty
    assert not np.asarray(found)[~np.asarray(mask)].any()
    for row in range(6):
        steps = np.flatnonzero(mask[row])
        expected = np.zeros(5)
        if len(steps):
            expected[steps[-1]] = reward[row]
        np.testing.assert_allclose(received[row], expected, atol=1e-6)


def test_means_and_whitening_ignore_what_is_masked():
    mask = response_masks(1, 8, 6)
    clean = normal(0, 8, 6)
    dirty = jnp.where(mask, clean, jnp.inf)
    kept = np.asarray(clean)[np.asarray(mask)]
    np.testing.assert_allclose(objectives.masked_mean(dirty, mask), kept.mean(), rtol=1e-5)
    assert objectives.masked_mean(dirty, jnp.zeros_like(mask)) == 0
    whitened = np.asarray(objectives.masked_whiten(dirty, mask))
    assert not whitened[~np.asarray(mask)].any()
    np.testing.assert_allclose(whitened[mask].mean(), 0, atol=1e-5)
    np.testing.assert_allclose(whitened[mask].std(), 1, rtol=1e-4)


def test_the_margin_loss_is_a_hinge_and_the_logistic_loss_a_likelihood():
    chosen, rejected = jnp.asarray([2.0, 0.5, -1.0]), jnp.asarray([0.0, 0.0, 1.0])
    hinge = objectives.margin_ranking_loss(chosen, rejected, margin=1.0)
    np.testing.assert_allclose(hinge, [0.0, 0.5, 3.0])
    logistic = objectives.logistic_loss(chosen, rejected)
    np.testing.assert_allclose(logistic, np.log1p(np.exp([-2.0, -0.5, 2.0])), rtol=1e-6)


@pytest.mark.parametrize(
    "advantage, logratio, pushes",
    [(1.0, 0.5, False), (1.0, -0.5, True), (-1.0, 0.5, True), (-1.0, -0.5, False)],
)
def test_the_clipped_surrogate_stops_pushing_where_it_already_gained(advantage, logratio, pushes):
    def loss(logprobs):
        old, advantages = jnp.zeros((1, 1)), jnp.full((1, 1), advantage)
        return objectives.clipped_policy_loss(logprobs, old, advantages, ratio_clip=0.2).sum()

    value, gradient = jax.value_and_grad(loss)(jnp.full((1, 1), logratio))
    ratio = np.exp(logratio)
    worst = max(-advantage * ratio, -advantage * np.clip(ratio, 0.8, 1.2))
    np.testing.assert_allclose(value, worst, rtol=1e-6)
    assert bool(gradient.any()) is pushes


def test_the_value_loss_takes_the_larger_of_clipped_and_unclipped():
    values, old = jnp.asarray([[1.0, 0.1, -1.0]]), jnp.zeros((1, 3))
    found = objectives.clipped_value_loss(
        values, old, jnp.asarray([[1.0, 1.0, 1.0]]), value_clip=0.2
    )
    np.testing.assert_allclose(found, [[0.5 * 0.8**2, 0.5 * 0.9**2, 0.5 * 2.0**2]], rtol=1e-6)


def test_k3_keeps_its_digits_where_the_policies_are_close():
    difference = np.asarray([[1e-4, -1e-4, 3e-3, 0.5]])
    found = objectives.kl_k3(jnp.zeros((1, 4)), jnp.asarray(difference, jnp.float32))
    expected = np.expm1(difference) - difference  # float64
    np.testing.assert_allclose(found, expected, rtol=1e-2)


def test_the_kl_estimators_average_to_the_exact_kl():
    policy, reference = (jax.nn.log_softmax(normal(seed, 1, 7)) for seed in (0, 1))
    exact = float((jnp.exp(policy) * (policy - reference)).sum())
    for estimate in (objectives.kl_k1, objectives.kl_k3):
        mean = float((jnp.exp(policy) * estimate(policy, reference)).sum())
        assert mean == pytest.approx(exact, rel=1e-5)
    assert float(objectives.kl_k3(policy, reference).min()) >= 0
    np.testing.assert_allclose(
        objectives.approximate_kl(policy, reference), (policy - reference) ** 2 / 2, rtol=1e-6
    )


def test_explained_variance_is_one_for_a_perfect_critic_and_zero_for_a_constant_one():
    returns, mask = normal(0, 8, 6), response_masks(1, 8, 6)
    dirty = jnp.where(mask, 0.0, 1e6)
    for values, expected in ((returns + dirty, 1.0), (jnp.full((8, 6), 3.0) + dirty, 0.0)):
        found = objectives.explained_variance(values, returns, mask)
        assert float(found) == pytest.approx(expected, abs=1e-4)


def test_the_kl_controller_rises_tenfold_within_ten_steps_falls_slower_and_rests_at_its_target():
    def after(steps, kl):
        weight = 0.05
        for _ in range(steps):
            weight = objectives.next_kl_weight(weight, kl, target=0.05, gain=0.3)
        return weight

    assert after(8, 0.5) > 0.5
    assert after(1, 0.5) / 0.05 == pytest.approx((0.05 / after(1, -0.01)) ** 4)
    assert after(40, -0.01) < 0.005
    assert after(5, 0.05) == pytest.approx(0.05)


def test_leave_one_out_is_the_return_less_the_mean_of_the_others():
    returns = np.random.default_rng(0).normal(size=(5, 4)).astype(np.float32)
    found = objectives.leave_one_out_advantages(jnp.asarray(returns))
    for i in range(5):
        for j in range(4):
            others = np.delete(returns[i], j).mean()
            assert float(found[i, j]) == pytest.approx(returns[i, j] - others, abs=1e-6)


def test_group_advantages_are_standard_scores_within_a_prompt_and_zero_where_all_are_equal():
    returns = np.random.default_rng(0).normal(size=(5, 4)).astype(np.float32)
    returns[2] = 3.0
    found = np.asarray(objectives.group_advantages(jnp.asarray(returns)))
    assert not found[2].any()
    expected = (returns - returns.mean(axis=1, keepdims=True))[[0, 1, 3, 4]]
    expected /= returns[[0, 1, 3, 4]].std(axis=1, keepdims=True)
    np.testing.assert_allclose(found[[0, 1, 3, 4]], expected, rtol=1e-3)
    scaled = objectives.group_advantages(jnp.asarray(10 * returns + 2))
    np.testing.assert_allclose(scaled, found, rtol=1e-3, atol=1e-6)

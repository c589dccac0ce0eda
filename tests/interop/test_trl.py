"""A step of PPO on given episodes beside TRL's, whose own code makes every number compared here.

TRL's trainer runs as it is, with two things replaced: the sampling, which returns the given
episodes, and the optimizer, which is plain gradient descent. Its intermediate numbers are read from
the frame of its training loop. Where it differs from ours, the difference is meant and is shown to
be all there is: see the table in the report's appendix.
"""

import copy
import dataclasses
import os
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from rlhf_jax import objectives
from rlhf_jax.config import PPOConfig
from rlhf_jax.export import huggingface
from rlhf_jax.language_model.sampling import Responses
from rlhf_jax.optimization.state import TrainState
from rlhf_jax.ppo import actor_critic
from rlhf_jax.ppo.rollout import Frozen, Static
from rlhf_jax.ppo.update import advantages_and_returns, update
from rlhf_jax.pretrained.model import random_model
from rlhf_jax.pretrained.prompt_rows import prompt_rows
from rlhf_jax.pretrained.tensor_names import huggingface_tensors
from rlhf_jax.reward_model import model as reward_models

pytestmark = [
    pytest.mark.interop,
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning"),
]
os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"  # PPO stands among what may change
torch = pytest.importorskip("torch", reason="needs the extra `interop`")
trl = pytest.importorskip("trl", reason="needs TRL 1.9: make .venv-interop/done brings it")
import transformers  # noqa: E402
from datasets import Dataset  # noqa: E402
from trl.experimental import utils as trl_utils  # noqa: E402
from trl.experimental.ppo import ppo_trainer  # noqa: E402

RATE = 0.5  # of gradient descent: the second inner epoch clips
KL_WEIGHT = 0.3
CFG = PPOConfig(
    batch=8, forward_batch=4, passes=1, prompts=8, prompt_tokens=40, response_tokens=6,
    inner_epochs=2, approx_kl_limit=1e6, temperature=0.8, gae_decay=0.9, discount=0.98,
    value_weight=0.3, kl_weight=KL_WEIGHT,
)  # fmt: skip
FULL, EARLY, CUT = "every response ends in the last column", "some end early", "some never end"


@pytest.fixture(scope="module")
def models():
    """(model, policy some way from it, reward model without offset)."""
    model = random_model()
    built = actor_critic.build(model, None, seed=0)
    leaves, structure = jax.tree.flatten(built.trainable)
    keys = jax.random.split(jax.random.key(5), len(leaves))
    noisy = [x + 0.1 * jax.random.normal(key, x.shape) for x, key in zip(leaves, keys, strict=True)]
    rewarder = reward_models.RewardModel(nnx.merge(model.definition, model.state), rngs=nnx.Rngs(3))
    reward_model = reward_models.FrozenRewardModel(*nnx.split(rewarder))
    policy = built._replace(trainable=jax.tree.unflatten(structure, noisy))
    return model, policy, reward_model


def episodes(model, kind):
    """Prompts of several lengths and responses of letters, by how they end."""
    tokenizer = model.tokenizer
    texts = ["a", "bc", "dab", "x", "h", "gg", "fade", "c"]
    prompts, prompt_mask, _ = prompt_rows(texts, tokenizer, length=CFG.prompt_tokens)
    letters = tokenizer.encode(["abcdefghijklmnopqrstuvwxyz"])[0]
    tokens = np.random.default_rng(0).choice(letters, (8, CFG.response_tokens)).astype(np.int32)
    lengths = np.full(8, CFG.response_tokens)
    if kind == EARLY:
        lengths = np.array([2, 6, 4, 5, 6, 3, 1, 6])
    mask = np.arange(CFG.response_tokens) < lengths[:, None]
    ended = np.arange(8) % 2 == 0 if kind == CUT else np.ones(8, bool)
    last = np.arange(CFG.response_tokens) == lengths[:, None] - 1
    tokens = np.where(last & ended[:, None], tokenizer.end, tokens)
    tokens = np.where(mask, tokens, tokenizer.pad)
    responses = Responses(tokens, mask, np.zeros(mask.shape, np.float32))
    return prompts, prompt_mask, jax.tree.map(jnp.asarray, responses)


def our_step(models, given, cfg):
    """Episodes, rewards, advantages, metrics and the parameters after the step."""
    model, policy, reward_model = models
    optimizer = optax.sgd(RATE)
    start = jax.tree.map(jnp.copy, policy.trainable)
    state = TrainState(start, optimizer.init(start), jnp.zeros((), jnp.int32))
    static = Static(
        policy.definition, model.definition, (("reward", 1.0, reward_model.definition),),
        optimizer, cfg, model.tokenizer.ends,
    )  # fmt: skip
    frozen = Frozen(policy.frozen, model.state, {"reward": reward_model.state})
    after, metrics, scored = update(
        state, frozen, *given, {}, KL_WEIGHT, jax.random.key(1), static=static
    )
    cut_off = ~np.isin(given[2].tokens, model.tokenizer.ends).any(axis=1)
    rewards = objectives.token_rewards(
        scored.reward - cfg.missing_end_penalty * cut_off, scored.logprobs,
        scored.reference_logprobs, scored.mask, kl_weight=KL_WEIGHT,
    )  # fmt: skip
    whitened, returns = advantages_and_returns(rewards, scored, cfg)
    trained = nnx.merge(policy.definition, after.trainable, policy.frozen)
    return {
        "logprobs": scored.logprobs, "ref_logprobs": scored.reference_logprobs,
        "values": scored.values, "scores": scored.reward - cfg.missing_end_penalty * cut_off,
        "rewards": rewards, "returns": returns, "advantages": returns - scored.values,
        "whitened": whitened, "pg_loss": metrics["policy_loss"],
        "vf_loss": metrics.get("value_loss"), "clipped": metrics["clip_fraction"],
        "mask": np.asarray(scored.mask),
        "parameters": huggingface_tensors(nnx.state(trained.decoder), model.config),
        "value head": trained.value.kernel[...],
    }  # fmt: skip


def their_step(models, given, cfg, folder, *, bessel=False):
    """The same from TRL's trainer.

    Args:
      bessel: TRL's own unbiased variance in whitening; without it the biased one, as here.
    """
    model, policy, reward_model = models
    merged = nnx.merge(*policy)
    decoders = {"policy": merged.decoder, "reference": nnx.merge(model.definition, model.state)}
    for name, decoder in decoders.items():
        huggingface.export_policy(decoder, model, folder / name, {"do_sample": True})
    huggingface.export_reward_model(reward_model, model, folder / "reward")
    tuned, reference = (
        transformers.AutoModelForCausalLM.from_pretrained(folder / name, dtype=torch.float32)
        for name in decoders
    )
    rewarder = transformers.AutoModelForSequenceClassification.from_pretrained(folder / "reward")
    critic = copy.deepcopy(rewarder)
    critic.model = tuned.model  # the critic reads the policy's hidden states, as here
    critic.score = torch.nn.Linear(model.config.embed_dim, 1)
    with torch.no_grad():
        kernel, bias = (np.array(x[...]) for x in (merged.value.kernel, merged.value.bias))
        critic.score.weight.copy_(torch.tensor(kernel.reshape(1, -1)))
        critic.score.bias.copy_(torch.tensor(bias))
    prompts, _, responses = given
    whole = torch.tensor(np.concatenate([prompts, responses.tokens], axis=1)).long()
    order, seen, losses = [], {}, []

    def given_episodes(policy, queries, batch, pad, config):
        rows = [int((whole[:, : queries.shape[1]] == query).all(1).nonzero()) for query in queries]
        order.extend(rows)
        logits = ppo_trainer.forward(policy, whole[rows], pad).logits
        return whole[rows], logits[:, queries.shape[1] - 1 : -1] / (cfg.temperature + 1e-7)

    def watched_whitening(values, mask, shift_mean=True):
        found = sys._getframe(1).f_locals
        names = ("logprobs", "ref_logprobs", "values", "scores", "rewards", "advantages", "returns")
        whitened = original_whitening(values, mask, shift_mean)
        numbers = {name: found[name] for name in names} | {"whitened": whitened, "mask": mask}
        seen.update({name: value.clone() for name, value in numbers.items()})
        return whitened

    def variance(values, mask, unbiased=True):
        return original_variance(values, mask, unbiased and bessel)

    original_whitening, original_variance = ppo_trainer.masked_whiten, ppo_trainer.masked_var
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ppo_trainer, "batch_generation", given_episodes)
        patch.setattr(ppo_trainer, "masked_whiten", watched_whitening)
        patch.setattr(ppo_trainer, "masked_var", variance)
        settings = ppo_trainer.PPOConfig(
            output_dir=str(folder / "trl"), use_cpu=True, bf16=False, report_to="none",
            save_strategy="no", num_sample_generations=0, gradient_checkpointing=False,
            disable_tqdm=True, logging_strategy="no", total_episodes=cfg.batch,
            per_device_train_batch_size=cfg.forward_batch, stop_token="eos",
            gradient_accumulation_steps=cfg.batch // cfg.forward_batch,
            local_rollout_forward_batch_size=cfg.batch, num_ppo_epochs=cfg.inner_epochs,
            response_length=cfg.response_tokens, temperature=cfg.temperature, kl_estimator="k1",
            kl_coef=KL_WEIGHT, missing_eos_penalty=cfg.missing_end_penalty, gamma=cfg.discount,
            lam=cfg.gae_decay, cliprange=cfg.ratio_clip, cliprange_value=cfg.value_clip,
            vf_coef=cfg.value_weight,
        )  # fmt: skip
        parameters = {*tuned.parameters(), *critic.parameters()}
        descent = torch.optim.SGD(parameters, lr=RATE)
        trainer = ppo_trainer.PPOTrainer(
            settings,
            processing_class=transformers.AutoTokenizer.from_pretrained(folder / "policy"),
            model=tuned, ref_model=reference, reward_model=rewarder, value_model=critic,
            train_dataset=Dataset.from_dict({"input_ids": np.asarray(prompts).tolist()}),
            optimizers=(descent, torch.optim.lr_scheduler.LambdaLR(descent, lambda step: 1.0)),
        )  # fmt: skip
        # At the end of the data, which one batch is here, accelerate steps at every forward batch.
        trainer.accelerator.gradient_state.plugin_kwargs.update(sync_with_dataloader=False)
        backward = trainer.accelerator.backward

        def watched_backward(loss):
            found = sys._getframe(1).f_locals
            losses.append([float(found[name].detach()) for name in ("pg_loss", "vf_loss")])
            backward(loss)

        patch.setattr(trainer.accelerator, "backward", watched_backward)
        trainer.train()
    back = np.argsort(order)
    last = np.mean(losses[-(cfg.batch // cfg.forward_batch) :], axis=0)
    return {
        **{name: value.numpy()[back] for name, value in seen.items()},
        "pg_loss": last[0], "vf_loss": last[1],
        "parameters": {name: x.detach().numpy() for name, x in tuned.state_dict().items()},
        "value head": critic.score.weight.detach().numpy(),
    }  # fmt: skip


def assert_equal(ours, theirs, *names, mask=None):
    for name in names:
        one, other = np.asarray(ours[name]), np.asarray(theirs[name])
        if mask is not None:
            one, other = one[mask], other[mask]
        np.testing.assert_allclose(one, other, rtol=2e-4, atol=2e-5, err_msg=name)


def assert_same_parameters(ours, theirs, before):
    """What gradient descent changed, relative to the size of the change."""
    for name, value in ours["parameters"].items():
        change = np.linalg.norm(value - before[name])
        apart = np.linalg.norm(value - theirs["parameters"][name])
        assert change > 1e-3 and apart < 1e-3 * change, name


def parameters_before(models):
    model, policy, _ = models
    return huggingface_tensors(nnx.state(nnx.merge(*policy).decoder), model.config)


PER_TOKEN = ("logprobs", "ref_logprobs", "values", "rewards", "returns", "advantages", "whitened")


def test_a_step_is_trls_where_every_response_fills_its_row(models, tmp_path):
    given = episodes(models[0], FULL)
    ours, theirs = our_step(models, given, CFG), their_step(models, given, CFG, tmp_path)
    assert theirs["mask"].all() and ours["mask"].all()
    assert_equal(ours, theirs, *PER_TOKEN, "scores", "pg_loss", "vf_loss")
    assert 0.05 < ours["clipped"] < 0.95
    assert_same_parameters(ours, theirs, parameters_before(models))
    value_heads = (np.ravel(each["value head"]) for each in (ours, theirs))
    np.testing.assert_allclose(*value_heads, rtol=1e-3, atol=1e-4)


def test_whitening_differs_by_bessels_correction_alone(models, tmp_path):
    given, cfg = episodes(models[0], FULL), dataclasses.replace(CFG, inner_epochs=1)
    ours = our_step(models, given, cfg)
    theirs = their_step(models, given, cfg, tmp_path, bessel=True)
    count = ours["mask"].sum()
    theirs["whitened"] *= np.sqrt(count / (count - 1))
    assert_equal(ours, theirs, *PER_TOKEN)


def test_trl_pays_a_response_that_ends_early_one_position_later(models, tmp_path):
    """There its critic has a value, too. At decay and discount 1 the advantages are the same."""
    given = episodes(models[0], EARLY)
    cfg = dataclasses.replace(CFG, discount=1.0, gae_decay=1.0, inner_epochs=1)
    ours, theirs = our_step(models, given, cfg), their_step(models, given, cfg, tmp_path)
    mask = ours["mask"]
    np.testing.assert_array_equal(mask, theirs["mask"])
    assert_equal(ours, theirs, "scores")
    names = ("logprobs", "ref_logprobs", "values", "returns", "advantages", "whitened")
    assert_equal(ours, theirs, *names, mask=mask)
    moved = np.array(theirs["rewards"])
    for row, end in enumerate(mask.sum(axis=1)):
        if end < mask.shape[1]:
            moved[row, end - 1] += moved[row, end]
            moved[row, end] = 0
    np.testing.assert_allclose(ours["rewards"], np.where(mask, moved, 0), rtol=2e-4, atol=2e-5)


def test_trl_means_over_each_forward_batch_and_here_over_the_whole_batch(models, tmp_path):
    """In one forward batch, without the critic, TRL's step is ours in two."""
    given = episodes(models[0], EARLY)
    cfg = dataclasses.replace(CFG, discount=1.0, gae_decay=1.0, value_weight=0.0)
    whole = dataclasses.replace(cfg, forward_batch=8)
    ours, theirs = our_step(models, given, cfg), their_step(models, given, whole, tmp_path / "a")
    assert_equal(ours, theirs, "pg_loss")
    assert_same_parameters(ours, theirs, parameters_before(models))
    apart = their_step(models, given, cfg, tmp_path / "b")
    with pytest.raises(AssertionError):
        assert_same_parameters(ours, apart, parameters_before(models))


def test_a_response_that_was_cut_off_is_read_with_its_end_here(models, tmp_path):
    """TRL reads it as it is. With the end, its own function gives our reward."""
    given, cfg = episodes(models[0], CUT), dataclasses.replace(CFG, inner_epochs=1)
    ours, theirs = our_step(models, given, cfg), their_step(models, given, cfg, tmp_path)
    tokenizer = models[0].tokenizer
    cut = ~np.isin(given[2].tokens, tokenizer.ends).any(axis=1)
    assert cut.sum() == 4
    assert_equal(ours, theirs, "logprobs", "ref_logprobs", "values")
    assert_equal(ours, theirs, "scores", mask=~cut)
    rows = np.concatenate([given[0], given[2].tokens, np.full((8, 1), tokenizer.end)], axis=1)
    rows[~cut, -1] = tokenizer.pad
    rewarder = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "reward")
    with torch.no_grad():
        _, scores, _ = trl_utils.get_reward(
            rewarder, torch.tensor(rows).long(), tokenizer.pad, given[0].shape[1]
        )
    np.testing.assert_allclose(ours["scores"], scores.numpy() - cut, rtol=2e-4, atol=2e-5)
    assert np.abs(np.asarray(ours["scores"]) - theirs["scores"])[cut].min() > 1e-3

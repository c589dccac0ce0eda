import re

import jax
import jax.numpy as jnp
from flax import nnx

from rlhf_jax.chat import answer, chat
from rlhf_jax.config import LoRAConfig
from rlhf_jax.language_model import logprobs
from rlhf_jax.ppo import actor_critic
from rlhf_jax.reward_model import model as reward_models


def talk(monkeypatch, capsys, models, reward_model, tokenizer, *questions):
    left = iter(questions)
    monkeypatch.setattr("builtins.input", lambda prompt: next(left))
    chat(models, reward_model, tokenizer, prompt_tokens=48, response_tokens=6)
    assert next(left, None) is None
    return capsys.readouterr().out


def test_every_model_answers_with_the_reward_of_its_own_answer(model, monkeypatch, capsys):
    tuned = actor_critic.build(model, LoRAConfig(), seed=0)
    moved = jax.tree.map(lambda x: x + 0.5, tuned.trainable)
    models = {
        "pretrained": (model.definition, model.state),
        "ppo-lora": tuned._replace(trainable=moved).decoder(),
    }
    rewarder = reward_models.RewardModel(nnx.merge(*models["pretrained"]), rngs=nnx.Rngs(0))
    reward_model = reward_models.FrozenRewardModel(*nnx.split(rewarder))
    shown = talk(
        monkeypatch, capsys, models, reward_model, model.tokenizer, "Why \x1b[2J?", "How?", ""
    )
    found = re.findall(r"^(\S+) \(reward ([+-]\d+\.\d\d)(, cut off)?\)\n(.*)", shown, re.MULTILINE)
    assert [name for name, *_ in found] == ["pretrained", "ppo-lora"] * 2
    assert "\x1b" not in shown
    text, score, ended = answer(
        "How?",
        models["ppo-lora"],
        reward_model,
        model.tokenizer,
        1,
        1.0,
        prompt_tokens=48,
        response_tokens=6,
    )
    assert found[3][1] == f"{score:+.2f}" and (found[3][2] == "") == ended
    words = [*model.tokenizer.prefix, *model.tokenizer.encode(["How?"])[0], *model.tokenizer.suffix]
    definition, state = models["ppo-lora"]
    likely = answer(
        "How?",
        models["ppo-lora"],
        reward_model,
        model.tokenizer,
        1,
        0.0,
        prompt_tokens=48,
        response_tokens=1,
    )[0]

    @jax.jit
    def next_token(state):
        tokens = jnp.asarray([[*words, 0]])
        decoder = nnx.merge(definition, state)
        states = logprobs.response_states(decoder, tokens, jnp.ones_like(tokens, bool), len(words))
        return decoder.logits(states)[0, 0].argmax()

    assert likely == model.tokenizer.decode([int(next_token(state))])


def test_end_of_input_ends_the_conversation(model, monkeypatch, capsys):
    def closed(prompt):
        raise EOFError

    monkeypatch.setattr("builtins.input", closed)
    decoder = nnx.merge(model.definition, model.state)
    reward_model = reward_models.FrozenRewardModel(
        *nnx.split(reward_models.RewardModel(decoder, rngs=nnx.Rngs(0)))
    )
    chat({"pretrained": (model.definition, model.state)}, reward_model, model.tokenizer)
    assert "reward" not in capsys.readouterr().out


def test_a_question_that_is_cut_is_said_to_be(model, monkeypatch, capsys):
    rewarder = reward_models.RewardModel(nnx.merge(model.definition, model.state), rngs=nnx.Rngs(0))
    reward_model = reward_models.FrozenRewardModel(*nnx.split(rewarder))
    models = {"pretrained": (model.definition, model.state)}
    room = 48 - model.tokenizer.template_length
    shown = talk(
        monkeypatch, capsys, models, reward_model, model.tokenizer, "x" * room + "y", "Why?", ""
    )
    assert shown.count("read only the beginning of this question, up to “" + "x" * room + "”") == 1

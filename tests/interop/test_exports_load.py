"""Exports as transformers and PEFT see them: no warning, the same numbers."""

import copy
import dataclasses
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from experiment_runs.checkpoints import save_weights
from experiment_runs.run import ensure
from rlhf_jax.config import LINEAR_LAYERS, LoRAConfig, PPOConfig, RewardConfig
from rlhf_jax.export import foreign_reward_model, huggingface
from rlhf_jax.language_model import logprobs
from rlhf_jax.language_model.decoder import Decoder, DecoderConfig
from rlhf_jax.language_model.sampling import Responses
from rlhf_jax.ppo import actor_critic
from rlhf_jax.pretrained import model as pretrained_model
from rlhf_jax.pretrained.prompt_rows import prompt_rows
from rlhf_jax.pretrained.tensor_names import leaf_name
from rlhf_jax.pretrained.tokenizer import CHATML
from rlhf_jax.reward_model import model as reward_models

pytestmark = [
    pytest.mark.interop,
    # PEFT 0.21 asks transformers 5 for an attribute by its old name, whatever it loads
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]
torch = pytest.importorskip("torch", reason="needs the extra `interop`")
peft = pytest.importorskip("peft", reason="needs the extra `interop`")
from transformers import (  # noqa: E402
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    LlamaConfig,
    LlamaForSequenceClassification,
    Qwen3Config,
    Qwen3ForSequenceClassification,
)

FAMILIES = {
    "llama": {"rope_theta": 50_000.0},
    "qwen2": {"tie_word_embeddings": False},
    "qwen3": {"head_dim": 16},
    "smollm3": {"no_rope_layers": [0, 1]},
    "gemma3_text": {
        "sliding_window": 5,
        "query_pre_attn_scalar": 5,
        "layer_types": ["sliding_attention", "full_attention"],
    },
}
# its last turn without what follows in the others
ENDS_AT_ONCE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content']"
    " + '<|im_end|>' + ('' if loop.last and not add_generation_prompt else '\\n') }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
LORAS = (LoRAConfig(), LoRAConfig(rank=4, alpha=6.0, targets=LINEAR_LAYERS))


@pytest.fixture(params=FAMILIES)
def model(request):
    """A small model of each family in which no parameter is zero or one."""
    base = pretrained_model.random_model()
    config = {**base.huggingface_config, "model_type": request.param, **FAMILIES[request.param]}
    config |= {"attention_dropout": 0.0, "use_sliding_window": False}
    decoder = DecoderConfig.from_huggingface(config)
    state = noisy(nnx.state(Decoder(decoder, rngs=nnx.Rngs(0))))
    return dataclasses.replace(base, config=decoder, huggingface_config=config, state=state)


@pytest.fixture(autouse=True)
def silence():
    """No line of warning from the libraries' own loggers either."""
    heard = []

    class Ear(logging.Handler):
        def emit(self, record):
            heard.append(record.getMessage())

    ear = Ear(logging.WARNING)
    names = ("transformers", "peft")
    for name in names:
        logging.getLogger(name).addHandler(ear)
    yield
    for name in names:
        logging.getLogger(name).removeHandler(ear)
    assert not heard


def noisy(state, scale=0.2, seed=1):
    leaves, tree = jax.tree.flatten(state)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    moved = [x + scale * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)]
    return jax.tree.unflatten(tree, moved)


def rows(model, *, left):
    """Rows of different lengths and which of their columns are real."""
    random = np.random.default_rng(0)
    tokens = random.integers(4, model.config.vocab_size, (4, 24)).astype(np.int32)
    lengths = np.array([24, 17, 5, 1])[:, None]
    columns = np.arange(24)[None]
    mask = columns >= 24 - lengths if left else columns < lengths
    return np.where(mask, tokens, model.tokenizer.pad).astype(np.int32), mask


def our_logits(decoder, tokens, mask):
    definition, state = nnx.split(decoder)

    @jax.jit
    def logits(state):
        decoder = nnx.merge(definition, state)
        padded = jnp.pad(tokens, ((0, 0), (0, 1))), jnp.pad(mask, ((0, 0), (0, 1)))
        return decoder.logits(logprobs.response_states(decoder, *padded, 1))

    return np.asarray(logits(state))


def their_inputs(tokens, mask):
    positions = np.maximum(np.cumsum(mask, axis=1) - 1, 0)
    arrays = {"input_ids": tokens, "attention_mask": mask, "position_ids": positions}
    return {name: torch.tensor(array.astype(np.int64)) for name, array in arrays.items()}


def difference(theirs, decoder, model):
    """Largest difference of the logits at real tokens, both paddings."""
    largest = 0.0
    for left in (True, False):
        tokens, mask = rows(model, left=left)
        with torch.no_grad():
            logits = theirs(**their_inputs(tokens, mask)).logits.numpy()
        ours = our_logits(decoder, tokens, mask)
        assert ours[mask].std() > 0.5
        largest = max(largest, np.abs(logits - ours)[mask].max())
    return largest


def loaded(kind, path):
    """What transformers loads, which must not miss or ignore a single tensor."""
    theirs, info = kind.from_pretrained(path, output_loading_info=True)
    assert not any(info.values()), info
    assert theirs.dtype == torch.float32
    return theirs.eval()


def test_policy_loads_silently_with_the_same_logits(model, tmp_path):
    decoder = nnx.merge(model.definition, model.state)
    huggingface.export_policy(
        decoder, model, tmp_path, huggingface.generation_settings(PPOConfig())
    )
    theirs = loaded(AutoModelForCausalLM, tmp_path)
    assert difference(theirs, decoder, model) < 1e-3
    assert theirs.generation_config.top_k == 0
    assert theirs.config.pad_token_id == model.tokenizer.pad


def test_fresh_adapters_are_spread_as_those_that_peft_makes(model, tmp_path):
    huggingface.export_policy(nnx.merge(model.definition, model.state), model, tmp_path, {})
    base = AutoModelForCausalLM.from_pretrained(tmp_path)
    theirs = peft.get_peft_model(base, peft.LoraConfig(r=64, target_modules=["q_proj", "v_proj"]))
    ours = actor_critic.build(model, LoRAConfig(rank=64), seed=0).decoder()[1]
    spreads = (
        np.concatenate([np.ravel(x) for x in factors]).std()
        for factors in (
            [p.detach().numpy() for name, p in theirs.named_parameters() if "lora_A" in name],
            [x for path, x in jax.tree_util.tree_leaves_with_path(ours)
             if leaf_name(path).endswith("lora_a")],
        )
    )  # fmt: skip
    assert next(spreads) == pytest.approx(next(spreads), rel=0.03)


@pytest.mark.parametrize("lora", LORAS, ids=["qv", "all"])
def test_adapter_loads_silently_with_the_same_logits(model, lora, tmp_path):
    tuned = actor_critic.build(model, lora, seed=0)
    decoder = nnx.merge(*tuned._replace(trainable=noisy(tuned.trainable))).decoder
    huggingface.export_policy(decoder, model, tmp_path / "base", {})
    huggingface.export_adapter(decoder, lora, model, tmp_path)
    base = loaded(AutoModelForCausalLM, tmp_path / "base")
    assert difference(base, decoder, model) > 0.05  # the adapter matters
    theirs = peft.PeftModel.from_pretrained(base, tmp_path).eval()
    assert difference(theirs, decoder, model) < 1e-3
    factors = {name: p for name, p in theirs.named_parameters() if "lora_B" in name}
    assert len(factors) == len(lora.targets) * model.config.num_layers
    assert all(p.abs().min() > 0 for p in factors.values())
    config = theirs.peft_config["default"]
    assert (config.r, config.lora_alpha) == (lora.rank, lora.alpha)
    assert set(config.target_modules) == set(lora.targets)
    merged = theirs.merge_and_unload()
    assert difference(merged, decoder, model) < 1e-3


def noisy_reward_model(model, offset=0.7, gain=2.5):
    rewarder = reward_models.RewardModel(nnx.merge(model.definition, model.state), rngs=nnx.Rngs(3))
    rewarder.offset[...], rewarder.gain[...] = jnp.float32(offset), jnp.float32(gain)
    return reward_models.FrozenRewardModel(*nnx.split(rewarder))


def our_rewards(reward_model, tokens, mask):
    rows = jnp.asarray(tokens), jnp.asarray(mask)
    return np.asarray(
        jax.jit(lambda state: nnx.merge(reward_model.definition, state)(*rows))(reward_model.state)
    )


def test_reward_model_loads_silently_with_the_same_scores(model, tmp_path):
    reward_model = noisy_reward_model(model)
    huggingface.export_reward_model(reward_model, model, tmp_path)
    theirs = loaded(AutoModelForSequenceClassification, tmp_path)
    for left in (True, False):
        tokens, mask = rows(model, left=left)
        ours = our_rewards(reward_model, tokens, mask)
        with torch.no_grad():
            scores = theirs(**their_inputs(tokens, mask)).logits[:, 0].numpy()
        error = np.abs(scores - theirs.config.reward_offset - ours).max()
        assert ours.std() > 0.2 and error < 1e-4


@pytest.mark.parametrize("lora", LORAS, ids=["qv", "all"])
def test_reward_adapter_loads_silently_with_the_same_scores(model, lora, tmp_path):
    definition, trainable, frozen = reward_models.initial(model, 0, lora)
    rewarder = nnx.merge(definition, noisy(trainable), frozen)
    rewarder.offset[...], rewarder.gain[...] = jnp.float32(0.7), jnp.float32(2.5)
    reward_model = reward_models.FrozenRewardModel(*nnx.split(rewarder))
    head = huggingface.head_weight(rewarder)
    huggingface.export_reward_model(reward_model, model, tmp_path / "base")
    huggingface.export_adapter(rewarder.decoder, lora, model, tmp_path, head=head)
    base = loaded(AutoModelForSequenceClassification, tmp_path / "base")
    with torch.no_grad():
        base.score.weight.zero_()  # the adapter brings its own
    theirs = peft.PeftModel.from_pretrained(base, tmp_path)
    assert isinstance(theirs, peft.PeftModelForSequenceClassification)
    assert not theirs.training
    rewarder.decoder = huggingface.merged_adapters(rewarder.decoder)
    huggingface.export_reward_model(
        reward_models.FrozenRewardModel(*nnx.split(rewarder)), model, tmp_path / "merged"
    )
    merged = loaded(AutoModelForSequenceClassification, tmp_path / "merged")
    tokens, mask = rows(model, left=False)
    ours = our_rewards(reward_model, tokens, mask)
    for other in (theirs, merged):
        with torch.no_grad():
            scores = other(**their_inputs(tokens, mask)).logits[:, 0].numpy()
        assert np.abs(scores - merged.config.reward_offset - ours).max() < 1e-4
    assert ours.std() > 0.2


def test_reward_model_of_transformers_scores_the_same_here(tmp_path):
    own = pretrained_model.random_model()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=own.tokenizer.vocab_size, hidden_size=32, intermediate_size=48,
        num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, num_labels=1,
        pad_token_id=own.tokenizer.pad, initializer_range=0.3,
    )  # fmt: skip
    theirs = LlamaForSequenceClassification(config).eval()
    theirs.save_pretrained(tmp_path)
    own.tokenizer.huggingface.save_pretrained(tmp_path)
    reward_model = foreign_reward_model.load_reward_model(tmp_path, own.tokenizer)
    tokens, mask = rows(own, left=False)
    with torch.no_grad():
        scores = theirs(**their_inputs(tokens, mask)).logits[:, 0].numpy()
    ours = our_rewards(reward_model, tokens, mask)
    assert ours.std() > 0.1
    np.testing.assert_allclose(ours, scores, atol=1e-4)


@pytest.mark.parametrize(
    ("template", "pad"),
    [(CHATML, "<|pad|>"), (CHATML, "<|im_end|>"), (ENDS_AT_ONCE, "<|pad|>"),
     (ENDS_AT_ONCE, "<|im_end|>")],
    ids=["a line end follows", "and the end pads", "nothing follows", "and the end pads there"],
)  # fmt: skip
def test_a_reward_model_of_another_trainer_is_read_where_its_template_ends(template, pad, tmp_path):
    """The score of whole conversations, as its pipeline renders them, at their last token.

    Where that is the token that it pads with, it is the last other one.
    """
    own = pretrained_model.random_model()
    theirs_tokenizer = copy.deepcopy(own.tokenizer.huggingface)
    theirs_tokenizer.chat_template = template
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=own.tokenizer.vocab_size, hidden_size=32, intermediate_size=48,
        num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
        num_labels=1, pad_token_id=theirs_tokenizer.convert_tokens_to_ids(pad),
        initializer_range=0.3,
    )  # fmt: skip
    theirs = Qwen3ForSequenceClassification(config).eval()
    theirs.save_pretrained(tmp_path)
    theirs_tokenizer.save_pretrained(tmp_path)
    reward_model = foreign_reward_model.load_reward_model(tmp_path, own.tokenizer)
    questions, answers = ["Why?", "a longer question"], ["Because.", "so it goes"]
    expected = []
    for question, answer in zip(questions, answers, strict=True):
        messages = [("system", ""), ("user", question), ("assistant", answer)]
        rendered = theirs_tokenizer.apply_chat_template(
            [{"role": role, "content": text} for role, text in messages], return_tensors="pt"
        )
        with torch.no_grad():
            expected.append(float(theirs(rendered["input_ids"]).logits[0, 0]))
    prompts, prompt_mask, _ = prompt_rows(questions, own.tokenizer, length=64)
    replies = own.tokenizer.encode(answers, reply=True)
    tokens, mask = np.full((2, 10), own.tokenizer.pad), np.zeros((2, 10), bool)
    for row, reply in enumerate(replies):  # the second is cut off: ten letters and no end
        reply = [*reply, own.tokenizer.end][:10]
        tokens[row, : len(reply)], mask[row, : len(reply)] = reply, True
    responses = Responses(jnp.asarray(tokens, jnp.int32), jnp.asarray(mask), jnp.zeros((2, 10)))
    rewards = reward_models.response_rewards(
        reward_model.state, jnp.asarray(prompts), jnp.asarray(prompt_mask), responses,
        definition=reward_model.definition, end=own.tokenizer.ends,
    )  # fmt: skip
    assert abs(expected[0] - expected[1]) > 0.1
    np.testing.assert_allclose(rewards, expected, atol=1e-4)


SUMMARY = {
    "accuracy": {"value": 0.7, "low": 0.6, "high": 0.8, "count": 9},
    "baselines": {"longer": {"accuracy": {"value": 0.6, "low": 0.5, "high": 0.8, "count": 9}}},
    "length_correlation": 0.4,
    "scale": {"offset": 0.7, "gain": 2.5},
    "reward_last_quarter": 0.3,
    "kl_last_quarter": 0.04,
    "trained_parameters": {"x": 9},
}


@pytest.mark.parametrize(
    ("stage", "lora"),
    [("reward", None), ("reward", LoRAConfig()), ("ppo-full", None), ("ppo-lora", LoRAConfig())],
)
def test_code_on_the_card_runs(stage, lora, tmp_path):
    own = pretrained_model.random_model()
    if stage == "reward":
        cfg, name = RewardConfig(lora=lora), "best"
        weights = reward_models.initial(own, 0, lora)[1]
    else:
        cfg, name = PPOConfig(lora=lora, response_tokens=5), "policy"
        weights = actor_critic.build(own, lora, seed=0).trainable

    def train(run):
        save_weights(run.checkpoints / name, noisy(weights))
        run.finish(**SUMMARY)

    run = ensure(stage, cfg, train, inputs={}, root=tmp_path / "runs")
    huggingface.export_run(run, own, tmp_path / "out")
    code = (tmp_path / "out" / "README.md").read_text().split("```python\n")[1].split("```")[0]
    scope = {"path": str(tmp_path / "out"), "question": "Why?", "answer": "Because."}
    exec(code, scope)
    tokens = scope["inputs"]["input_ids"].numpy().astype(np.int32)
    if stage == "reward":
        reward_model = reward_models.load(run, own)
        ours = our_rewards(reward_model, tokens, np.ones_like(tokens, bool))
        assert tokens[0, -1] == own.tokenizer.end
        assert scope["reward"] == pytest.approx(float(ours[0]), abs=1e-4)
    else:
        assert scope["answer"].shape[1] <= tokens.shape[1] + 5


def test_exported_tokenizer_reads_as_ours(tmp_path):
    own = pretrained_model.random_model().tokenizer
    huggingface.save_tokenizer(own, tmp_path, padding_side="left")
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    text = "naïve  text\n\tand 123 <b>"
    assert theirs(text, add_special_tokens=False)["input_ids"] == own.encode([text])[0]

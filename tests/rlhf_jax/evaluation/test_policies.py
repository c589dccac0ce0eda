"""A whole evaluation on the toy: pretrained, itself as a tuned policy, and two that moved."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from experiment_runs import run as runs
from rlhf_jax.config import EvaluationConfig, LoRAConfig, PPOConfig
from rlhf_jax.evaluation import policies as evaluation
from rlhf_jax.intervals import bootstrap
from rlhf_jax.language_model import sampling
from rlhf_jax.ppo import actor_critic
from rlhf_jax.pretrained.prompt_rows import prompt_rows
from rlhf_jax.pretrained.responses import respond, response_texts
from rlhf_jax.reward_model import model as reward_models

CFG = EvaluationConfig(
    prompts=6, responses_per_prompt=2, best_of=5, rated_prompts=2, batch=8, resamples=200
)
LENGTHS = PPOConfig(
    prompt_tokens=16, response_tokens=5, temperature=0.8, batch=4, forward_batch=4, prompts=4
)
PROMPTS = ["a", "bc", "dab", "h", "fadefadefadefade", "c"]
CONVERSATIONS = ["x", "y", "x", "z", "w", "v"]  # the first and the third prompt belong together
RATED = ("pretrained", "ppo-full", "ppo-lora")


class CutOff(Exception):
    pass


class FragileRun(runs.Run):
    """A run that is cut off while it keeps its samples."""

    def sample(self, **row):
        super().sample(**row)
        if len(self.samples()) == 9:
            raise CutOff


def moved(toy, lora):
    """The decoder of a policy some way from the pretrained one."""
    built = actor_critic.build(toy, lora, seed=0)
    rng = np.random.default_rng(5)
    noisy = jax.tree.map(
        lambda x: x + 0.05 * rng.normal(size=x.shape).astype(np.float32), built.trainable
    )
    return built._replace(trainable=noisy).decoder()


@pytest.fixture(scope="module")
def tuned(toy):
    return {
        "ppo-full": (toy.definition, toy.state),  # has learnt nothing
        "ppo-lora": moved(toy, LoRAConfig()),
        "ppo-full-1": moved(toy, None),
    }


@pytest.fixture(scope="module")
def evaluate(toy, toy_reward_model, tuned):
    """A function that evaluates into a folder; the second reward is twice the other."""
    doubled = nnx.merge(*toy_reward_model, copy=True)
    doubled.gain[...] = jnp.float32(2)
    both = {
        "reward": toy_reward_model,
        "second_reward": reward_models.FrozenRewardModel(*nnx.split(doubled)),
    }

    def ensure(root, kind=runs.Run):
        def train(run):
            loaders = {name: functools.partial(tuned.get, name) for name in tuned}
            evaluation.evaluate(
                kind(run.path), CFG, LENGTHS, toy, both, loaders, PROMPTS, CONVERSATIONS
            )

        return runs.ensure("evaluate", CFG, train, inputs={}, root=root)

    return ensure


@pytest.fixture(scope="module")
def evaluated(evaluate, tmp_path_factory):
    return evaluate(tmp_path_factory.mktemp("runs"))


def responses_of(run, name):
    return [row["response"] for row in run.samples() if row["model"] == name]


def test_a_policy_that_learnt_nothing_says_the_same_and_gains_nothing(evaluated):
    gain = evaluated.summary["gains"]["ppo-full"]
    assert (gain["wins"], gain["ties"], gain["losses"]) == (0, len(PROMPTS), 0)
    for name in ("reward", "second_reward", "tokens", "length_controlled"):
        assert gain[name]["value"] == gain[name]["low"] == gain[name]["high"] == 0
    for name in ("pretrained", "ppo-full"):
        assert abs(evaluated.arrays()[f"{name}.kl"]).max() < 1e-6
    assert responses_of(evaluated, "ppo-full") == responses_of(evaluated, "pretrained")


def test_policies_that_moved_are_told_apart(evaluated):
    policies, gains = evaluated.summary["policies"], evaluated.summary["gains"]
    assert set(policies) == {"pretrained", *gains} and len(gains) == 3
    for name in ("ppo-lora", "ppo-full-1"):
        assert policies[name]["kl_per_token"] > 1e-2
        assert responses_of(evaluated, name) != responses_of(evaluated, "pretrained")
        assert gains[name]["ties"] < len(PROMPTS)


def test_seeds_of_a_variant_are_averaged_prompt_by_prompt(evaluated):
    arrays, variants = evaluated.arrays(), evaluated.summary["variants"]
    assert set(variants) == {"ppo-full"}  # and "ppo-full-1"; LoRA was trained once
    for reward_model in ("reward", "second_reward"):
        base, *seeds = (
            arrays[f"{name}.{reward_model}"] for name in ("pretrained", "ppo-full", "ppo-full-1")
        )
        gains = [(own - base).mean() for own in seeds]
        assert variants["ppo-full"][reward_model]["value"] == pytest.approx(
            sum(gains) / 2, abs=1e-6
        )
        assert variants["ppo-full"][reward_model]["count"] == len(PROMPTS)
    assert variants["ppo-full"]["seeds"] == 2


def test_prompts_of_one_conversation_are_drawn_together(evaluated):
    arrays, gains = evaluated.arrays(), evaluated.summary["gains"]
    change = (arrays["ppo-lora.reward"] - arrays["pretrained.reward"]).mean(axis=1)
    options = {"resamples": CFG.resamples, "seed": CFG.seed}
    together = bootstrap(change, clusters=np.asarray(CONVERSATIONS), **options)
    assert gains["ppo-lora"]["reward"] == pytest.approx(together._asdict(), abs=1e-6)
    assert bootstrap(change, **options).low != pytest.approx(together.low)
    assert evaluated.summary["conversations"] == 5


def test_a_prompt_gets_several_responses_of_which_the_first_is_the_only_one_of_one(
    evaluated, toy, tuned
):
    found = evaluated.arrays()["ppo-lora.tokens"]
    assert found.shape == (len(PROMPTS), CFG.responses_per_prompt)
    rows, mask, _ = prompt_rows(PROMPTS, toy.tokenizer, length=16)
    texts = {
        samples: response_texts(
            respond(
                tuned["ppo-lora"], rows, mask, toy.tokenizer, length=5,
                temperature=CFG.temperature, seed=CFG.seed, samples=samples,
            ),
            toy.tokenizer,
        )
        for samples in (1, 3)
    }  # fmt: skip
    assert texts[3][::3] == texts[1] == responses_of(evaluated, "ppo-lora")
    assert texts[3][1::3] != texts[1]


def test_best_of_n_is_that_of_the_samples_and_policies_are_compared_at_their_distance(evaluated):
    arrays, summary = evaluated.arrays(), evaluated.summary
    samples = arrays["best_of.reward"]
    assert samples.shape == (len(PROMPTS), CFG.best_of)
    assert [row["n"] for row in summary["best_of_n"]] == [1, 2, 4]
    assert summary["best_of_n"][0]["reward"]["value"] == pytest.approx(samples.mean(), abs=1e-5)
    values = [row["reward"]["value"] for row in summary["best_of_n"]]
    assert values == sorted(values)
    for name, gain in summary["gains"].items():
        against, kl = gain["best_of_n"], summary["policies"][name]["kl_per_sequence"]
        nearest = [
            row for row in summary["best_of_n"] if row["n"] == 1 or row["kl_per_sequence"] <= kl
        ][-1]
        assert against["n"] == nearest["n"]
        ahead = summary["policies"][name]["reward"]["value"] - nearest["reward"]["value"]
        assert against["reward"]["value"] == pytest.approx(ahead, abs=1e-5)


def test_the_perplexity_is_that_of_the_model_that_all_are_compared_with(evaluated, toy):
    """Of the pretrained policy it is that of its own logprobs at sampling."""
    rows, mask, _ = prompt_rows(PROMPTS, toy.tokenizer, length=16)
    responses = respond(
        (toy.definition, toy.state), rows, mask, toy.tokenizer, length=5,
        temperature=CFG.temperature, seed=CFG.seed, samples=CFG.responses_per_prompt,
    )  # fmt: skip
    own = np.where(responses.mask, responses.logprobs, 0).sum(axis=1)
    np.testing.assert_allclose(evaluated.arrays()["pretrained.surprise"].ravel(), -own, rtol=1e-4)
    perplexity = np.exp(-own.sum() / np.asarray(responses.mask).sum())
    assert evaluated.summary["policies"]["pretrained"]["perplexity"] == pytest.approx(
        perplexity, rel=1e-4
    )


def test_the_kl_is_that_at_the_temperature_of_the_samples(evaluated, toy, tuned):
    tokens, mask, _ = prompt_rows(PROMPTS, toy.tokenizer, length=16)
    definition, state = tuned["ppo-lora"]
    keys = sampling.draw_keys(jax.random.key(CFG.seed), range(len(PROMPTS)))
    responses = sampling.sample(
        state, tokens, mask, keys, CFG.temperature, decoder_def=definition, length=5,
        end=toy.tokenizer.ends, pad=toy.tokenizer.pad,
    )  # fmt: skip
    assert LENGTHS.temperature != CFG.temperature
    expected, _ = evaluation.sequence_kl(
        state, toy.state, tokens, mask, responses, CFG.temperature,
        definitions=(definition, toy.definition), forward_batch=3,
    )  # fmt: skip
    np.testing.assert_allclose(evaluated.arrays()["ppo-lora.kl"][:, 0], expected, rtol=1e-4)


def test_each_reward_model_scores_in_its_own_column(evaluated):
    arrays = evaluated.arrays()
    for name in evaluated.summary["policies"]:
        assert arrays[f"{name}.reward"].any()
        np.testing.assert_allclose(
            arrays[f"{name}.second_reward"], 2 * arrays[f"{name}.reward"], rtol=1e-6
        )


def test_every_response_is_kept_with_its_reward_and_those_to_rate_are_marked(evaluated):
    samples, arrays = evaluated.samples(), evaluated.arrays()
    expected = itertools.product(["pretrained", *evaluated.summary["gains"]], range(len(PROMPTS)))
    assert [(row["model"], row["prompt_id"]) for row in samples] == [*expected]
    assert {(row["model"], row["prompt_id"]) for row in samples if row["rated"]} == {
        *itertools.product(RATED, range(CFG.rated_prompts))
    }
    for row in samples:
        assert row["prompt"] == PROMPTS[row["prompt_id"]]
        assert row["reward"] == pytest.approx(arrays[f"{row['model']}.reward"][row["prompt_id"], 0])


def test_a_prompt_that_was_cut_is_not_rated_while_there_are_others(tmp_path):
    for number, (read, rated) in enumerate(
        [(["", "", "x", ""], {0, 1}), (["x", "", "x", ""], {1, 3}), (["x", "x", "", "x"], {0, 2})]
    ):
        (tmp_path / str(number)).mkdir()
        (tmp_path / str(number) / "config.json").write_text("{}")
        run = runs.Run(tmp_path / str(number))
        texts, columns = {"pretrained": ["r"] * 8}, {"pretrained": {"reward": np.zeros((4, 2))}}
        evaluation.keep_responses(run, ["p"] * 4, read, texts, columns, CFG)
        assert {row["prompt_id"] for row in run.samples() if row["rated"]} == rated


def test_responses_may_be_longer_than_in_training(toy):
    longest = []
    for tokens in (None, 9):
        cfg = dataclasses.replace(CFG, response_tokens=tokens)
        own = (toy.definition, toy.state)
        columns, _ = evaluation.answered(
            {"pretrained": lambda own=own: own}, tokenizer=toy.tokenizer, rewards={},
            prompts=PROMPTS, cfg=cfg, lengths=LENGTHS, reference=own, samples=1,
        )  # fmt: skip
        longest.append(columns["pretrained"]["tokens"].max())
    assert longest[0] <= 5 < longest[1] <= 9


def test_prompts_of_which_the_beginning_was_read_are_marked_and_counted(evaluated, toy):
    room = LENGTHS.prompt_tokens - toy.tokenizer.template_length
    long = [i for i, prompt in enumerate(PROMPTS) if len(toy.tokenizer.encode([prompt])[0]) > room]
    assert 0 < len(long) < len(PROMPTS)
    assert evaluated.summary["prompts_cut"] == len(long)
    for row in evaluated.samples():
        assert bool(row["read"]) == (row["prompt_id"] in long)
        assert row["prompt"].startswith(row["read"])


def test_an_evaluation_that_was_cut_off_keeps_every_sample_once(evaluate, evaluated, tmp_path):
    with pytest.raises(CutOff):
        evaluate(tmp_path, FragileRun)
    again = evaluate(tmp_path)
    assert again.samples() == evaluated.samples()
    assert again.summary == evaluated.summary


def test_a_policy_that_has_answered_is_not_asked_again(evaluate, evaluated, tmp_path, monkeypatch):
    asked, answered = [], evaluation.answered

    def counted(decoders, **options):
        asked.extend(decoders)
        if asked[-1] == "ppo-lora" and asked.count("ppo-lora") == 1:
            raise CutOff
        return answered(decoders, **options)

    monkeypatch.setattr(evaluation, "answered", counted)
    with pytest.raises(CutOff):
        evaluate(tmp_path)
    again = evaluate(tmp_path)
    assert asked == ["pretrained", "ppo-full", "ppo-lora", "ppo-lora", "ppo-full-1", "pretrained"]
    assert again.samples() == evaluated.samples() and again.summary == evaluated.summary
    assert not [*again.path.glob("answers-*")]


def test_however_much_was_answered_it_is_read_again(evaluated):
    columns, texts = {"reward": np.ones((3, 2), np.float32)}, ["x" * 2**23, "y" * 2**23, "z" * 9]
    kept = evaluation.kept_answers(evaluated, "many", lambda: (columns, texts))
    (evaluated.path / "answers-many.json").unlink()
    assert kept[1] == texts and kept[0]["reward"].dtype == np.float32


@pytest.mark.parametrize("name", ["ppo-lora", "ppo-full-1"])
def test_the_kl_of_a_response_is_that_of_the_whole_distributions_at_its_tokens(toy, tuned, name):
    """Computed again from unpadded episodes, in float64, with the softmax written out."""
    tokens, mask, _ = prompt_rows(PROMPTS, toy.tokenizer, length=16)
    definition, state = tuned[name]
    responses = sampling.sample(
        state, tokens, mask, jax.random.split(jax.random.key(2), len(PROMPTS)), 1.0,
        decoder_def=definition, length=5, end=toy.tokenizer.end, pad=toy.tokenizer.pad,
    )  # fmt: skip
    found, _ = evaluation.sequence_kl(
        state, toy.state, tokens, mask, responses, LENGTHS.temperature,
        definitions=(definition, toy.definition), forward_batch=4,
    )  # fmt: skip
    assert not responses.mask.all()  # some ended early
    width = tokens.shape[1] + 5
    episodes = np.full((len(PROMPTS), width), toy.tokenizer.pad)
    for i in range(len(PROMPTS)):
        kept = np.asarray(responses.tokens)[i][np.asarray(responses.mask)[i]]
        episode = [*tokens[i][mask[i]], *kept]
        episodes[i, : len(episode)] = episode
    own, other = (
        log_softmax(every_logit(*decoder, episodes) / LENGTHS.temperature)
        for decoder in (tuned[name], (toy.definition, toy.state))
    )
    kl = (np.exp(own) * (own - other)).sum(axis=-1)
    starts, counts = mask.sum(axis=1), np.asarray(responses.mask).sum(axis=1)
    expected = [
        row[start - 1 : start - 1 + count].sum()
        for row, start, count in zip(kl, starts, counts, strict=True)
    ]
    assert min(expected) > 1e-3
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-5)


@functools.partial(jax.jit, static_argnums=0)
def every_logit(definition, state, tokens):
    """Padded behind, where no real token looks."""
    decoder = nnx.merge(definition, state)
    rows, time = tokens.shape
    positions = jnp.broadcast_to(jnp.arange(time), (rows, time))
    visible = jnp.broadcast_to(jnp.tril(jnp.ones((time, time), bool)), (rows, time, time))
    return decoder.logits(decoder(tokens, positions, visible))


def log_softmax(logits):
    logits = np.asarray(logits, np.float64)
    return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))

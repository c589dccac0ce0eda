"""Reward of the pretrained and the tuned policies on prompts that nobody trained on."""

import functools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from experiment_runs import devices
from experiment_runs.files import encode, read_json, write_text
from experiment_runs.process import progress
from experiment_runs.run import Run
from rlhf_jax.baselines.best_of_n import best_of_n, best_of_n_kl, powers_of_two
from rlhf_jax.config import EvaluationConfig, PPOConfig
from rlhf_jax.data.dialogues import Conversation, shown
from rlhf_jax.evaluation.response_statistics import (
    Clusters,
    Columns,
    describe,
    gain,
    gain_over_seeds,
    intervals,
)
from rlhf_jax.language_model import logprobs
from rlhf_jax.language_model.sampling import Responses, in_parts, whole_part
from rlhf_jax.language_model.sharding import RULES
from rlhf_jax.ppo.rewards import Term, function_rewards, functions_of, models_of, reward_terms
from rlhf_jax.pretrained.model import Pretrained
from rlhf_jax.pretrained.prompt_rows import cut_texts, prompt_rows
from rlhf_jax.pretrained.responses import ended, respond, response_texts
from rlhf_jax.pretrained.tokenizer import Tokenizer
from rlhf_jax.reward_model.model import FrozenRewardModel, response_rewards

LARGEST_ANSWERS = 2**30  # bytes of what a policy has answered, kept until the end
BASE = "pretrained"
RATED = (BASE, "ppo-full", "ppo-lora")  # policies whose responses are rated by hand
SplitDecoder = tuple[nnx.GraphDef, nnx.State]
Decoders = Mapping[str, Callable[[], SplitDecoder]]  # a policy's name to what loads it


def evaluate(
    run: Run,
    cfg: EvaluationConfig,
    lengths: PPOConfig,
    pretrained: Pretrained,
    reward_models: Mapping[str, FrozenRewardModel],
    tuned: Decoders,
    prompts: Sequence[Conversation],
    conversations: Sequence[str],
) -> None:
    """Samples every policy's responses with the same random draws, scores and compares them.

    Args:
      run: where to write.
      cfg: the configuration.
      lengths: gives the lengths of prompts and responses that the policies were trained with.
      pretrained: the policy that the tuned ones are compared with.
      reward_models: "reward", the frozen one that the policies were tuned against, and
        "second_reward", trained on other posts, that no policy was tuned against.
      tuned: the tuned policies; one of them is held at a time. What a policy has answered is
        kept, so that an evaluation that is cut off asks it no more.
      prompts: unseen ones.
      conversations: which prompts belong together, so that the intervals draw them together.
    """
    clusters = np.asarray(conversations)
    rewards = reward_terms({name: (model, 1.0) for name, model in reward_models.items()})

    def ask(name: str, load: Callable[[], SplitDecoder], **options: Any):
        columns, texts = answered(
            {name: load}, tokenizer=pretrained.tokenizer, rewards=rewards, prompts=prompts,
            cfg=cfg, lengths=lengths, **options,
        )  # fmt: skip
        return columns[name], texts[name]

    reference = pretrained.definition, pretrained.state
    loaders: Decoders = {BASE: lambda: reference, **tuned}
    several = {"samples": cfg.responses_per_prompt, "reference": reference}
    columns, texts = {}, {}
    for name, load in loaders.items():
        asked = functools.partial(ask, name, load, **several)
        columns[name], texts[name] = kept_answers(run, name, asked)
    samples = columns[BASE]
    if cfg.best_of > 1:
        asked = functools.partial(ask, BASE, loaders[BASE], samples=cfg.best_of)
        samples, _ = kept_answers(run, "best-of-n", asked)
    chosen = {
        n: {name: best_of_n(samples["reward"], samples[name], n) for name in reward_models}
        for n in powers_of_two(samples["reward"].shape[1])
    }
    run.rewind(-1)  # what an attempt that was cut off has left
    read = cut_texts(prompts, pretrained.tokenizer, length=lengths.prompt_tokens)
    keep_responses(run, prompts, read, texts, columns, cfg)
    arrays = columns | {"best_of": {name: samples[name] for name in reward_models}}
    run.save_arrays(
        conversation=np.unique(clusters, return_inverse=True)[1],
        **{f"{name}.{key}": value for name, own in arrays.items() for key, value in own.items()},
    )
    policies = {
        name: describe(own, texts[name], clusters, cfg, rewards=[*reward_models])
        for name, own in columns.items()
    }
    run.finish(
        policies=policies,
        gains={
            name: gain(columns[name], columns[BASE], clusters, cfg)
            | {"best_of_n": against_best_of_n(columns[name], policies[name], chosen, clusters, cfg)}
            for name in tuned
        },
        variants={
            name: gain_over_seeds(runs, columns[BASE], clusters, cfg)
            for name, runs in over_seeds(columns).items()
        },
        best_of_n=[
            {"n": n, "kl_per_sequence": best_of_n_kl(n), **intervals(values, clusters, cfg)}
            for n, values in chosen.items()
        ],
        prompts=len(prompts),
        conversations=len(np.unique(clusters)),
        responses_per_prompt=cfg.responses_per_prompt,
        prompts_cut=sum(map(bool, read)),
    )
    for file in run.path.glob("answers-*.json"):
        file.unlink()


def kept_answers(
    run: Run, name: str, ask: Callable[[], tuple[Columns, list[str]]]
) -> tuple[Columns, list[str]]:
    """What a policy answers, from the run's folder where an attempt before has left it there."""
    path = run.path / f"answers-{name}.json"
    if not path.exists():
        columns, texts = ask()
        stored = {column: [str(own.dtype), own.tolist()] for column, own in columns.items()}
        write_text(path, encode({"columns": stored, "texts": texts}))
    kept = read_json(path, largest=LARGEST_ANSWERS)
    columns = {column: np.asarray(own, kind) for column, (kind, own) in kept["columns"].items()}
    return columns, kept["texts"]


@devices.on_mesh
def answered(
    decoders: Decoders,
    *,
    tokenizer: Tokenizer,
    rewards: Mapping[str, Term],
    prompts: Sequence[Conversation],
    cfg: EvaluationConfig,
    lengths: PPOConfig,
    samples: int,
    reference: SplitDecoder | None = None,
) -> tuple[dict[str, Columns], dict[str, list[str]]]:
    """Every model's responses as text, those to a prompt together, and what is measured of each.

    Args:
      decoders: loaded one after the other.
      tokenizer: of all of them.
      rewards: become columns of their names, beside "tokens" and "ended".
      prompts: unseen ones.
      cfg: the configuration.
      lengths: gives the lengths of prompts and, where `cfg` names none, of responses.
      samples: responses to each prompt.
      reference: gives two more columns in nats a response: "kl" to it, and its "surprise", minus
        the log-probability that it gives to the response.
    """
    rows, masks, _ = prompt_rows(prompts, tokenizer, length=lengths.prompt_tokens)
    columns: dict[str, Columns] = {}
    texts: dict[str, list[str]] = {}
    most = max(1, cfg.batch // samples)  # prompts at a time; batches of one size compile once
    even = (n for n in range(most // 2 + 1, most + 1) if len(prompts) % n == 0)
    size = max(even, default=most)
    starts = range(0, len(prompts), size)
    if reference:
        reference = reference[0], devices.sharded(reference[1], RULES)
    models = {
        name: term._replace(
            scorer=FrozenRewardModel(
                term.scorer.definition, devices.sharded(term.scorer.state, RULES)
            )
        )
        for name, term in models_of(rewards).items()
    }
    for name, load in decoders.items():
        bar = progress(label=f"evaluation of {name}", total=len(starts))
        decoder = load()
        parts, texts[name] = [], []
        decoder = decoder[0], devices.sharded(decoder[1], RULES)
        for start in starts:
            asked = repeated(prompts[start : start + size], samples)
            numbers = start + devices.filled(len(asked) // samples)
            batch = devices.over_devices((rows[numbers], masks[numbers]))
            responses = respond(
                decoder, *batch, tokenizer, length=cfg.response_tokens or lengths.response_tokens,
                temperature=cfg.temperature, seed=cfg.seed, first=start, samples=samples,
            )  # fmt: skip
            numbers = np.repeat(numbers, samples)
            batch = devices.over_devices((rows[numbers], masks[numbers]))
            told = Responses(*(x[: len(asked)] for x in devices.on_host(responses)))
            some = response_texts(told, tokenizer)
            texts[name] += some
            found = model_rewards(models, batch, responses, tokenizer.ends)
            if reference:
                found["kl"], found["surprise"] = sequence_kl(
                    decoder[1], reference[1], *batch, responses, cfg.temperature,
                    definitions=(decoder[0], reference[0]), forward_batch=lengths.forward_batch,
                )  # fmt: skip
            found = {name: own[: len(asked)] for name, own in devices.on_host(found).items()}
            found |= function_rewards(functions_of(rewards), asked, some)
            found["tokens"] = told.mask.sum(axis=1)
            found["ended"] = ended(told, tokenizer)
            parts.append(found)
            bar.update()
        columns[name] = {
            column: np.concatenate([part[column] for part in parts]).reshape(len(prompts), samples)
            for column in parts[0]
        }
        del decoder
        bar.close()
    return columns, texts


def repeated(prompts: Sequence[Conversation], times: int) -> list[Conversation]:
    """Every prompt so many times, one after the other."""
    return [prompt for prompt in prompts for _ in range(times)]


def over_seeds(columns: Mapping[str, Columns]) -> dict[str, list[Columns]]:
    """The runs of each variant that was trained with several seeds.

    The run "ppo-full-1" repeats "ppo-full" with another one.
    """
    variants: dict[str, list[Columns]] = {}
    for name, own in columns.items():
        variants.setdefault(re.sub(r"-\d+$", "", name), []).append(own)
    return {name: runs for name, runs in variants.items() if len(runs) > 1}


def against_best_of_n(
    columns: Columns,
    policy: Mapping[str, Any],
    chosen: Mapping[int, Mapping[str, Float[np.ndarray, "prompts"]]],
    clusters: Clusters,
    cfg: EvaluationConfig,
) -> dict[str, Any]:
    """A policy's rewards less those of the best of n at no greater distance from the reference.

    Of the n there are the largest one whose KL per response is at most the policy's.
    """
    n = max(n for n in chosen if n == 1 or best_of_n_kl(n) <= policy["kl_per_sequence"])
    ahead = {name: columns[name].mean(axis=1) - own for name, own in chosen[n].items()}
    return {"n": n, "kl_per_sequence": best_of_n_kl(n), **intervals(ahead, clusters, cfg)}


def model_rewards(
    models: Mapping[str, Term],
    batch: tuple[Array, Array],
    responses: Responses,
    end: tuple[int, ...],
) -> dict[str, Float[Array, "batch"]]:
    """Every reward model's reward of the responses to a batch of prompts."""
    return {
        name: response_rewards(
            term.scorer.state, *batch, responses, definition=term.scorer.definition, end=end
        )
        for name, term in models.items()
    }


def keep_responses(run, prompts, read, texts, columns, cfg: EvaluationConfig) -> None:
    """The first response to every prompt with its reward.

    Those to the first prompts that were read whole are for rating by hand; to prompts that were cut
    only where there are too few others.
    """
    rated = sorted(range(len(prompts)), key=lambda i: bool(read[i]))[: cfg.rated_prompts]
    for name in texts:
        for i, prompt in enumerate(prompts):
            run.sample(
                step=0, prompt_id=i, model=name, prompt=shown(prompt),
                response=texts[name][i * cfg.responses_per_prompt],
                reward=float(columns[name]["reward"][i, 0]),
                read=read[i],  # the beginning that was read, where the prompt was cut
                rated=i in rated and name in RATED,
            )  # fmt: skip


@functools.partial(jax.jit, static_argnames=("definitions", "forward_batch"))
def sequence_kl(
    state: nnx.State,
    reference_state: nnx.State,
    prompts: Array,
    prompt_mask: Array,
    responses: Responses,
    temperature: float | Float[Array, ""],
    *,
    definitions: tuple[nnx.GraphDef, nnx.GraphDef],
    forward_batch: int,
) -> tuple[Float[Array, "batch"], Float[Array, "batch"]]:
    """Exact KL to the reference, and minus the reference's logprob, summed over each response.

    Both in nats, at the temperature of the samples; of `forward_batch` responses at a time.
    """
    decoder = nnx.merge(definitions[0], state)
    reference = nnx.merge(definitions[1], reference_state)
    width = prompts.shape[1]

    def some(part):
        tokens, token_mask, mask = part
        states = logprobs.response_states(decoder, tokens, token_mask, width)
        others = logprobs.response_states(reference, tokens, token_mask, width)
        _, logprob, _, kl = logprobs.compare(
            decoder, reference, states, others, tokens[:, width:], temperature
        )
        return jnp.where(mask, kl, 0.0).sum(axis=1), jnp.where(mask, -logprob, 0.0).sum(axis=1)

    tokens = jnp.concatenate([prompts, responses.tokens], axis=1)
    token_mask = jnp.concatenate([prompt_mask, responses.mask], axis=1)
    return in_parts(
        some, (tokens, token_mask, responses.mask), whole_part(len(tokens), forward_batch)
    )

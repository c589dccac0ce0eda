"""A conversation in the terminal: every policy answers, the reward model scores each answer."""

from collections.abc import Mapping

import jax
from flax import nnx

from experiment_runs.errors import Stopped
from rlhf_jax.pretrained.prompt_rows import cut_texts, prompt_rows
from rlhf_jax.pretrained.responses import ended, respond, response_texts
from rlhf_jax.pretrained.tokenizer import Tokenizer
from rlhf_jax.ratings.plain_text import block, printable, read_until
from rlhf_jax.reward_model.model import FrozenRewardModel, response_rewards


def chat(
    models: Mapping[str, tuple[nnx.GraphDef, nnx.State]],
    reward_model: FrozenRewardModel | None,
    tokenizer: Tokenizer,
    *,
    prompt_tokens: int = 256,
    response_tokens: int = 128,
) -> None:
    """Asks for questions until there are no more, and shows the answers below each other.

    Every question stands for itself: the models were trained on single ones. All models get the
    same draws.

    Args:
      models: a policy's name to its decoder.
      reward_model: scores the answers, if there is one.
      tokenizer: of all of them.
      prompt_tokens: longest question, template included; what is longer is cut and said to be.
      response_tokens: longest answer.
    """
    print("Ask one question at a time; an empty line ends. The first answers take longest.")
    turn = 0
    while question := ask():
        if read := cut_texts([question], tokenizer, length=prompt_tokens)[0]:
            print(f"\n{printable(read_until(read))}")
        for name, decoder in models.items():
            text, reward, whole = answer(
                question, decoder, reward_model, tokenizer, turn, 1.0,
                prompt_tokens=prompt_tokens, response_tokens=response_tokens,
            )  # fmt: skip
            notes = [] if reward is None else [f"reward {reward:+.2f}"]
            notes += [] if whole else ["cut off"]
            said = f" ({', '.join(notes)})" if notes else ""
            print(f"\n{name}{said}\n{block(text)}", flush=True)
        turn += 1


def ask() -> str:
    """The next question; empty at the end of the conversation."""
    try:
        return input("\n> ").strip()
    except Stopped:  # by a signal to end
        raise
    except (EOFError, KeyboardInterrupt):
        print()
        return ""


def answer(
    question: str,
    decoder: tuple[nnx.GraphDef, nnx.State],
    reward_model: FrozenRewardModel | None,
    tokenizer: Tokenizer,
    turn: int,
    temperature: float,
    *,
    prompt_tokens: int,
    response_tokens: int,
) -> tuple[str, float | None, bool]:
    """A policy's answer, its reward, and whether it ended by itself."""
    rows, masks, _ = prompt_rows([question], tokenizer, length=prompt_tokens)
    prompt = jax.numpy.asarray(rows), jax.numpy.asarray(masks)
    responses = respond(
        decoder, *prompt, tokenizer,
        length=response_tokens, temperature=temperature, seed=0, first=turn,
    )  # fmt: skip
    reward = None
    if reward_model is not None:
        scored = response_rewards(
            reward_model.state, *prompt, responses, definition=reward_model.definition,
            end=tokenizer.ends,
        )  # fmt: skip
        reward = float(scored[0])
    (text,), (whole,) = response_texts(responses, tokenizer), ended(responses, tokenizer)
    return text, reward, bool(whole)

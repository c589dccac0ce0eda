"""Small real models, random posts and finished runs, shared by the tests of the language model."""

import contextlib
import dataclasses
import json

import jax
import numpy as np
import pytest
from flax import nnx

from experiment_runs import run as runs
from rlhf_jax import config
from rlhf_jax.data.preferences import Post
from rlhf_jax.language_model.decoder import Decoder
from rlhf_jax.ppo import training as ppo_training
from rlhf_jax.pretrained import model as pretrained_model
from rlhf_jax.pretrained.tensor_names import leaf_name
from rlhf_jax.pretrained.tokenizer import CHATML, Tokenizer, byte_level
from rlhf_jax.reward_model import model as reward_models

SPECIAL = ["<|pad|>", "<|im_start|>", "<|im_end|>", "<|unk|>"]


class Interrupted(Exception):
    pass


class FragileRun(runs.Run):
    """A run that is cut off while its third step is being logged."""

    def log(self, *, step, **row):
        super().log(step=step, **row)
        if step == 3:
            raise Interrupted


@pytest.fixture
def interruption(monkeypatch):
    """A context that expects the run it makes fragile to be cut off, past some checkpoints."""

    @contextlib.contextmanager
    def expected():
        with monkeypatch.context() as patch, pytest.raises(Interrupted):
            patch.setenv("RLHF_CHECKPOINT_SECONDS", "0")
            yield lambda run: FragileRun(run.path)

    return expected


@pytest.fixture(scope="session")
def timeless():
    """A function that drops from logged rows what no two runs have in common."""

    def select(run):
        metrics = run.metrics()
        return metrics[[name for name in metrics if "second" not in name and "memory" not in name]]

    return select


@pytest.fixture(scope="session")
def model():
    """Two small layers with random weights on bytes."""
    return pretrained_model.random_model()


@pytest.fixture(scope="session")
def random_posts():
    """A function that makes posts of random words."""

    def make(count, *, seed=0, replies=(2, 4), prompt=(3, 30), reply=(1, 12)):
        rng = np.random.default_rng(seed)

        def word(low, high):
            return "".join(rng.choice(list("abcdefgh "), rng.integers(low, high + 1)))

        made = []
        for i in range(count):
            texts = tuple(word(*reply) for _ in range(rng.integers(replies[0], replies[1] + 1)))
            every = [(a, b) for a in range(len(texts)) for b in range(len(texts)) if a != b]
            pairs = rng.permutation(every)[: rng.integers(1, 4)]
            made.append(
                Post(
                    post_id=f"p{i}", domain="ab"[i % 2], prompt=word(*prompt), replies=texts,
                    scores=(1,) * len(texts), pairs=tuple((int(a), int(b)) for a, b in pairs),
                )
            )  # fmt: skip
        return made

    return make


@pytest.fixture(scope="session")
def local_data(tmp_path_factory):
    """A function that writes small copies in the layout of SHP and OASST1 into a new folder.

    Some posts ask the same, and so do half of the messages, but for case and spaces.
    """

    def write(*, messages=60):
        rng = np.random.default_rng(0)

        def text():
            return " ".join("".join(rng.choice(list("abcdefgh"), 4)) for _ in range(5))

        questions = [text() for _ in range(80)]
        questions[1::10] = [f"{question.upper()} " for question in questions[::10]]
        pairs = [
            {
                "post_id": f"p{i // 2}", "domain": "ab"[i // 2 % 2], "history": questions[i // 2],
                "human_ref_A": text(), "human_ref_B": text(), "score_A": 3, "score_B": 1,
                "labels": 1,
            }
            for i in range(160)
        ]  # fmt: skip
        asked = [
            {
                "message_id": f"m{i}", "parent_id": None, "message_tree_id": f"t{i // 2}",
                "text": f" {questions[i].upper()}" if i % 2 else text(), "role": "prompter",
                "lang": "en", "deleted": False,
            }
            for i in range(messages)
        ]  # fmt: skip
        folder = tmp_path_factory.mktemp("data")
        for name, rows in (("shp", pairs), ("oasst", asked)):
            (folder / name).mkdir()
            lines = "".join(json.dumps(row) + "\n" for row in rows)
            (folder / name / "rows.jsonl").write_text(lines)
        return folder

    return write


@pytest.fixture(scope="session")
def toy():
    """A one-layer decoder over eight letters and four special tokens."""
    words = [*SPECIAL, *"abcdefgh"]
    tokenizer = Tokenizer.of(
        byte_level(
            {word: i for i, word in enumerate(words)}, [], SPECIAL,
            end="<|im_end|>", pad="<|pad|>", template=CHATML,
        )
    )  # fmt: skip
    base = pretrained_model.random_model()
    small = dataclasses.replace(
        base.config, vocab_size=len(words), num_layers=1, tied_embeddings=False
    )
    # Weights of this size let adapters alone reach a policy that is nearly certain of its token.
    state = jax.tree_util.tree_map_with_path(
        lambda path, x: 10 * x if leaf_name(path).endswith(("kernel", "unembedding")) else x,
        nnx.state(Decoder(small, rngs=nnx.Rngs(0))),
    )
    return dataclasses.replace(base, config=small, tokenizer=tokenizer, state=state)


@pytest.fixture(scope="session")
def best_token(toy):
    """The letter that the toy's reward model likes."""
    (token,) = toy.tokenizer.encode(["c"])[0]
    return token


@pytest.fixture(scope="session")
def toy_reward_model(toy, best_token):
    """A reward that grows with the share of one letter in prompt and response.

    Attention is uniform (queries and keys are zero) and hands on the first coordinate of the
    embedding, which is 1 for that letter and 0 for every other token.
    """
    rewarder = reward_models.RewardModel(Decoder(toy.config, rngs=nnx.Rngs(0)), rngs=nnx.Rngs(0))
    table = np.zeros(rewarder.decoder.embedding.shape, np.float32)
    table[:, 1] = 1
    table[best_token] = np.eye(table.shape[1])[0]
    rewarder.decoder.embedding[...] = jax.numpy.asarray(table)
    (block,) = rewarder.decoder.blocks
    for layer in (block.attention.q_proj, block.attention.k_proj, block.mlp.down_proj):
        layer.kernel[...] = jax.numpy.zeros_like(layer.kernel[...])
    for layer in (block.attention.v_proj, block.attention.o_proj, rewarder.score):
        layer.kernel[...] = jax.numpy.zeros_like(layer.kernel[...]).at[0, 0].set(1.0)
    return reward_models.FrozenRewardModel(*nnx.split(rewarder))


TOY_PPO = config.PPOConfig(
    learning_rate=2e-2, value_learning_rate=1e-2, batch=32, forward_batch=16, passes=31,
    inner_epochs=3, prompts=32, prompt_tokens=12, response_tokens=4, kl_weight=1e-3, kl_gain=0.01,
    approx_kl_limit=1.0, missing_end_penalty=0.0, sample_every=5,
)  # fmt: skip
TOY_PROMPTS = [a + b for a, b in zip("abcdefgh" * 4, "hgfedcba" * 4, strict=True)]


@pytest.fixture(scope="session")
def train_toy(toy, toy_reward_model):
    """A function that runs PPO on the toy, or returns the finished run."""

    def run(variant, root, *, train=ppo_training.train, **changes):
        cfg = dataclasses.replace(TOY_PPO, **changes)
        if variant == "lora":
            cfg = config.with_lora(cfg, learning_rate=2e-2)
        return runs.ensure(
            f"ppo-{variant}", cfg, lambda run: train(run, cfg, toy, toy_reward_model, TOY_PROMPTS),
            inputs={}, root=root,
        ), cfg  # fmt: skip

    return run


@pytest.fixture(scope="session", params=["full", "lora"])
def toy_run(request, train_toy, tmp_path_factory):
    """A finished PPO run on the toy with its configuration, of either variant."""
    return train_toy(request.param, tmp_path_factory.mktemp("runs"))

"""Packed posts against the plain computation, and training from the first to the last step."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from experiment_runs import errors
from experiment_runs import run as runs
from experiment_runs.devices import replicated
from rlhf_jax import objectives
from rlhf_jax.config import LoRAConfig, RewardConfig
from rlhf_jax.data.preferences import Post
from rlhf_jax.optimization.state import TrainState
from rlhf_jax.pretrained.tensor_names import leaf_name
from rlhf_jax.reward_model import encoding, packing
from rlhf_jax.reward_model import model as reward_models
from rlhf_jax.reward_model import training as reward_training

PAIRS, TOKENS, NARROW = 8, 160, 70  # a row of 70 tokens is shorter than some posts
CFG = RewardConfig(
    learning_rate=3e-3, batch_pairs=PAIRS, epochs=2, max_tokens=TOKENS, reference_samples=8,
    reference_prompt_tokens=64, reference_response_tokens=4,
)  # fmt: skip
REFERENCE_PROMPTS = ["abc", "dh", "e", "gg", "bad", "fa", "hd", "c"]


@pytest.fixture(scope="module")
def untrained(toy):
    return reward_models.initial(toy, 0)


@pytest.fixture(scope="module")
def posts(toy, random_posts):
    encoded, _ = encoding.encode_posts(random_posts(12), toy.tokenizer, max_tokens=TOKENS)
    return encoded


def packed(posts, toy, max_tokens=TOKENS):
    shapes = packing.row_shapes([posts], max_tokens=max_tokens)
    made = packing.pack(posts, shapes=shapes, batch_pairs=PAIRS, pad=toy.tokenizer.pad)
    return jax.tree.map(jnp.asarray, made)


def longest(posts):
    """The batch with the longest post."""
    groups = packing.groups(posts, **reward_training.limits(CFG))
    return max(
        groups, key=lambda group: max(len(p.prompt) + sum(map(len, p.replies)) for p in group)
    )


def plain_rows(posts, pad):
    """Every pair as two rows of prompt and reply, padded on the right; chosen first."""
    texts = [
        [*post.prompt, *post.replies[reply]]
        for place in (0, 1)
        for post in posts
        for reply in (pair[place] for pair in post.pairs)
    ]
    tokens = np.full((len(texts), TOKENS), pad)
    for row, text in enumerate(texts):
        tokens[row, : len(text)] = text
    return jnp.asarray(tokens), jnp.asarray([len(text) for text in texts])


@pytest.mark.parametrize("loss", ["hinge", "logistic"])
@pytest.mark.parametrize("row_tokens", [TOKENS, NARROW])
def test_packed_posts_have_the_loss_and_gradient_of_two_plain_passes(
    toy, untrained, posts, loss, row_tokens
):
    definition, trainable, scale = untrained
    group = longest(posts)
    cfg = dataclasses.replace(CFG, loss=loss)
    made = packed(group, toy, row_tokens)
    pieces = sum(map(len, packing.rows_of(group, row_tokens)))
    assert (pieces > len(group)) == (row_tokens == NARROW)
    tokens, lengths = plain_rows(group, toy.tokenizer.pad)
    mask = jnp.arange(TOKENS)[None] < lengths[:, None]

    @jax.jit
    @jax.value_and_grad
    def plain_loss(trainable):
        scores = nnx.merge(definition, trainable, scale)(tokens, mask)  # offset 0 and gain 1
        chosen, rejected = jnp.split(scores, 2)
        if loss == "hinge":
            return jnp.mean(objectives.margin_ranking_loss(chosen, rejected, margin=cfg.margin))
        return jnp.mean(objectives.logistic_loss(chosen, rejected))

    @jax.jit
    @jax.value_and_grad
    def packed_loss(trainable):
        model = nnx.merge(definition, trainable, scale)
        return reward_training.pair_loss(model.pairs(made), made, cfg)[0]

    (expected, expected_grads), (found, grads) = plain_loss(trainable), packed_loss(trainable)
    assert float(found) == pytest.approx(float(expected), rel=1e-5)
    for ours, theirs in zip(jax.tree.leaves(grads), jax.tree.leaves(expected_grads), strict=True):
        assert float(jnp.linalg.norm(ours - theirs)) <= 1e-5 * float(jnp.linalg.norm(theirs)) + 1e-9


def test_packed_scores_equal_those_of_a_reply_alone_on_either_side_of_padding(
    toy, untrained, posts
):
    definition, trainable, scale = untrained
    group = longest(posts)
    made = packed(group, toy)
    scores = np.asarray(reward_training.pair_scores(trainable, scale, made, definition=definition))
    real = np.asarray(made.weight) > 0
    packed_scores = np.concatenate([scores[made.chosen][real], scores[made.rejected][real]])
    tokens, lengths = plain_rows(group, toy.tokenizer.pad)
    right = jnp.arange(TOKENS)[None] < lengths[:, None]
    shift = (jnp.arange(TOKENS)[None] + lengths[:, None]) % TOKENS
    alone = jax.jit(lambda *row: nnx.merge(definition, trainable, scale)(*row))
    for rows in ((tokens, right), (jnp.take_along_axis(tokens, shift, 1), right[:, ::-1])):
        np.testing.assert_allclose(alone(*rows), packed_scores, rtol=1e-5, atol=1e-5)


def test_the_row_length_changes_no_score(toy, untrained, posts):
    definition, trainable, scale = untrained
    group = longest(posts)
    scores = []
    for width in (TOKENS, NARROW):
        made = packed(group, toy, width)
        found = np.asarray(
            reward_training.pair_scores(trainable, scale, made, definition=definition)
        )
        real = np.asarray(made.weight) > 0
        scores.append(np.concatenate([found[made.chosen][real], found[made.rejected][real]]))
    np.testing.assert_allclose(*scores, rtol=1e-5, atol=1e-5)


def test_a_cut_off_response_is_read_with_the_end_that_it_lacks():
    tokens = jnp.asarray([[5, 6, 7, 2, 0], [5, 6, 7, 8, 9], [5, 6, 7, 8, 2]])
    mask = jnp.asarray([[1, 1, 1, 1, 0], [1] * 5, [1] * 5], bool)
    longer, longer_mask = reward_models.with_end(tokens, mask, 2)
    np.testing.assert_array_equal(longer[:, :5], tokens)
    assert longer[1].tolist() == [5, 6, 7, 8, 9, 2]
    assert longer_mask.sum(axis=1).tolist() == [4, 6, 5]


def test_a_response_that_another_token_ended_is_read_with_the_end_of_the_template_and_its_tail():
    tokens = jnp.asarray([[3, 6, 7, 3, 0], [5, 6, 3, 8, 9], [5, 6, 7, 8, 3], [5, 6, 7, 8, 2]])
    mask = jnp.asarray([[1, 1, 1, 1, 0], [1] * 5, [1] * 5, [1] * 5], bool)
    longer, longer_mask = reward_models.with_end(tokens, mask, (2, 3), (7, 7))
    read = [row[real].tolist() for row, real in zip(longer, longer_mask, strict=True)]
    assert read == [
        [3, 6, 7, 2, 7, 7], [5, 6, 3, 8, 9, 2, 7, 7], [5, 6, 7, 8, 2, 7, 7], [5, 6, 7, 8, 2, 7, 7],
    ]  # fmt: skip


def test_the_scale_centres_and_stretches_the_reward(toy, untrained):
    definition, trainable, scale = untrained
    tokens = jnp.asarray([[4, 5, 2], [6, 7, 2]])
    mask = jnp.ones((2, 3), bool)
    plain = nnx.merge(definition, trainable, scale)
    raw = plain(tokens, mask)
    scaled = nnx.merge(definition, trainable, scale)
    scaled.offset[...], scaled.gain[...] = jnp.asarray(0.3), jnp.asarray(2.5)
    np.testing.assert_allclose(scaled(tokens, mask), (raw - 0.3) * 2.5, rtol=1e-5)


def test_accuracy_counts_a_tie_as_half_and_padding_not_at_all(toy, posts):
    post = dataclasses.replace(posts[0], replies=posts[0].replies[:2], pairs=((0, 1), (1, 0)))
    made = packed([post], toy)
    for scores, accuracy in ((jnp.zeros(2 * PAIRS), 0.5), (jnp.arange(2.0 * PAIRS), 0.5)):
        loss, metrics = reward_training.pair_loss(scores, made, CFG)
        assert float(metrics["accuracy"]) == accuracy and float(metrics["pairs"]) == 2
    assert float(loss) == 1.0  # hinge of +1 and -1 at margin 1


def test_an_update_over_two_devices_is_that_on_one(toy, untrained, posts):
    definition, trainable, scale = untrained
    optimizer = optax.sgd(0.1)
    made = packed(longest(posts), toy, NARROW)
    assert made.tokens.shape[0] % 2 == 0
    results = []
    for spread in (False, True):
        start = TrainState(trainable, optimizer.init(trainable), jnp.zeros((), jnp.int32))
        start = jax.tree.map(jnp.copy, start)
        inputs = (scale, made)
        if spread:
            start, inputs = replicated(start), (replicated(scale), reward_training.placed(made))
            assert len(inputs[1].tokens.sharding.device_set) == 2
        state, metrics = reward_training.update(
            start, *inputs, definition=definition, optimizer=optimizer, cfg=CFG
        )
        results.append((state.trainable, metrics))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), *results)


@pytest.mark.parametrize("count", [0, 1])
def test_too_few_responses_for_a_scale_are_told_before_the_training(toy, parts, tmp_path, count):
    def train(run):
        reward_training.train(run, CFG, toy, parts, ["a"] * count)

    with pytest.raises(errors.UserError, match=f"{count} prompts .*reference_samples=8.*needs two"):
        runs.ensure("reward", CFG, train, inputs={}, root=tmp_path)
    assert not [*tmp_path.rglob("metrics.jsonl")]


def test_a_reward_that_tells_no_responses_apart_has_no_scale(toy, untrained):
    definition, trainable, frozen = untrained
    flat = nnx.merge(definition, trainable, frozen, copy=True)
    flat.score.kernel[...] = jnp.zeros_like(flat.score.kernel[...])
    with pytest.raises(errors.UserError, match="3 reference responses have no spread.*deviation 0"):
        reward_models.scale_on_reference(
            reward_models.FrozenRewardModel(*nnx.split(flat)), toy, ["a", "b", "cd"], CFG
        )


@pytest.fixture(scope="module")
def parts(toy):
    """Pairs that are easy to tell apart: the chosen reply has the letter c."""
    rng = np.random.default_rng(0)

    def text(letters):
        return "".join(rng.choice(list(letters), rng.integers(5, 9)))

    def make(count):
        posts = [
            reward_post(i, text("abdefgh"), (text("abd") + "c", text("abdef")))
            for i in range(count)
        ]
        return encoding.encode_posts(posts, toy.tokenizer, max_tokens=TOKENS)

    return {"train": make(32), "validation": make(8), "test": make(24)}


def reward_post(number, prompt, replies):
    return Post(
        post_id=f"p{number}", domain="ab"[number % 2], prompt=prompt, replies=replies,
        scores=(2, 1), pairs=((0, 1),),
    )  # fmt: skip


LORA = dataclasses.replace(CFG, lora=LoRAConfig(), learning_rate=1e-2)


def train(run, cfg, toy, parts):
    reward_training.train(run, cfg, toy, parts, REFERENCE_PROMPTS)


@pytest.fixture(scope="module", params=[CFG, LORA], ids=["full", "lora"])
def cfg(request):
    return request.param


@pytest.fixture(scope="module")
def finished(cfg, toy, parts, tmp_path_factory):
    return runs.ensure(
        "reward",
        cfg,
        lambda run: train(run, cfg, toy, parts),
        inputs={},
        root=tmp_path_factory.mktemp("r"),
    )


@pytest.mark.parametrize("part", ["train", "validation", "test"])
def test_a_part_in_which_no_pair_fits_is_named(toy, random_posts, part):
    posts = dict.fromkeys(("train", "validation", "test"), random_posts(3))
    posts[part] = random_posts(3, reply=(TOKENS, TOKENS))
    with pytest.raises(errors.UserError, match=f"max_tokens=160 is too short .* {part} pair"):
        encoding.encode_parts(posts, toy.tokenizer, max_tokens=TOKENS)


def test_the_reward_model_learns_what_the_pairs_have_in_common(finished):
    assert finished.summary["accuracy"]["value"] > 0.9
    metrics = finished.metrics()
    assert metrics["loss"].iloc[-1] < 0.5 * metrics["loss"].iloc[0]


def test_only_what_the_variant_trains_has_moved(finished, cfg, toy):
    before = nnx.state(nnx.merge(*reward_models.initial(toy, cfg.seed, cfg.lora)))
    after = nnx.state(nnx.merge(*reward_models.load(finished, toy)))
    trained = {"score.kernel"}
    for path, _ in jax.tree.leaves_with_path(before["decoder"]):
        name = leaf_name(path)
        if cfg.lora is None or "lora_" in name:
            trained.add(f"decoder.{name}")
    moved = {
        leaf_name(path)
        for (path, old), new in zip(
            jax.tree.leaves_with_path(before), jax.tree.leaves(after), strict=True
        )
        if (old != new).any()
    }
    unread = {"decoder.unembedding"}  # by the loss; decayed as everything is
    assert moved - unread == (trained | {"offset", "gain"}) - unread
    sizes = {leaf_name(path): leaf.size for path, leaf in jax.tree.leaves_with_path(before)}
    counted = sum(finished.summary["parameters"].values())
    assert counted == sum(sizes[name] for name in trained)


def test_dropout_of_adapters_depends_on_the_step_alone(toy, posts):
    cfg = dataclasses.replace(LORA, lora=LoRAConfig(dropout=0.5))
    definition, trainable, frozen = reward_models.initial(toy, 0, cfg.lora)
    noise = jax.random.split(jax.random.key(1), len(jax.tree.leaves(trainable)))
    noise = jax.tree.unflatten(jax.tree.structure(trainable), list(noise))
    trainable = jax.tree.map(lambda x, k: x + jax.random.normal(k, x.shape), trainable, noise)
    made, optimizer = packed(longest(posts), toy), optax.sgd(0.0)
    losses = []
    for key in (jax.random.key(0), jax.random.key(0), jax.random.key(1), None):
        state = TrainState(jax.tree.map(jnp.copy, trainable), optimizer.init(trainable), 0)
        _, metrics = reward_training.update(
            state, frozen, made, definition=definition, optimizer=optimizer, cfg=cfg,
            dropout_key=key,
        )  # fmt: skip
        losses.append(float(metrics["loss"]))
    assert losses[0] == losses[1] and len(set(losses)) == 3


def test_the_weights_of_the_best_validation_loss_are_kept(toy, parts, tmp_path):
    """Validation pairs that contradict the training pairs: the best step is not the last."""
    posts, fit = parts["validation"]
    contrary = [dataclasses.replace(post, pairs=((1, 0),)) for post in posts]
    run = runs.ensure(
        "reward", CFG, lambda run: train(run, CFG, toy, parts | {"validation": (contrary, fit)}),
        inputs={}, root=tmp_path,
    )  # fmt: skip
    measured = run.metrics().dropna(subset="validation_loss").set_index("step")
    best = run.summary["best"]
    assert best["step"] == measured["validation_loss"].idxmin() != measured.index[-1]
    assert best["loss"] == measured["validation_loss"].min()
    frozen = nnx.merge(*reward_models.load(run, toy))
    definition, *weights = nnx.split(frozen, nnx.Param, reward_models.RewardScale)
    trainable, scale = map(replicated, weights)
    batches = [batch for _, batch in reward_training.batches(contrary, CFG, toy.tokenizer.pad)]
    scored = reward_training.measure(trainable, scale, batches, definition=definition, cfg=CFG)
    assert scored["loss"] == pytest.approx(best["loss"], rel=1e-6)


def test_an_interrupted_run_resumes_to_the_same_bits(
    finished, cfg, toy, parts, timeless, interruption, tmp_path
):
    def ensure(prepare):
        return runs.ensure(
            "reward", cfg, lambda run: train(prepare(run), cfg, toy, parts),
            inputs={}, root=tmp_path,
        )  # fmt: skip

    with interruption() as fragile:
        ensure(fragile)
    resumed = ensure(lambda run: run)
    assert timeless(resumed).equals(timeless(finished))
    assert resumed.samples() == finished.samples()
    for name, column in finished.arrays("test_pairs").items():
        np.testing.assert_array_equal(resumed.arrays("test_pairs")[name], column)
    ours, theirs = (reward_models.load(run, toy).state for run in (resumed, finished))
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


@pytest.mark.slow
def test_a_run_goes_on_on_another_mesh_with_the_same_numbers(
    finished, cfg, toy, parts, interruption, tmp_path, monkeypatch
):
    """Begun with its matrices split over two devices, finished on one."""

    def ensure(mesh, prepare):
        monkeypatch.setenv("RLHF_MESH", mesh)
        return runs.ensure(
            "reward", cfg, lambda run: train(prepare(run), cfg, toy, parts),
            inputs={}, root=tmp_path,
        )  # fmt: skip

    with interruption() as fragile:
        ensure("model=2", fragile)
    moved = ensure("data=1", lambda run: run)
    for column in ("loss", "gradient_norm", "validation_loss"):
        values = (run.metrics()[column] for run in (moved, finished))
        np.testing.assert_allclose(*values, rtol=1e-3, atol=1e-5)
    scales = (run.summary["scale"]["offset"] for run in (moved, finished))
    np.testing.assert_allclose(*scales, rtol=1e-2)


def test_the_reward_model_gives_reference_responses_mean_zero_and_deviation_one(finished, toy):
    """The scale is measured again on the responses that it was made from."""
    loaded = reward_models.load(finished, toy)
    scale = reward_models.scale_on_reference(loaded, toy, REFERENCE_PROMPTS, CFG)
    assert scale["offset"] == pytest.approx(0, abs=1e-4)
    assert scale["gain"] == pytest.approx(1, rel=1e-4)

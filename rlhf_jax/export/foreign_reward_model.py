"""A reward model in transformers' layout, ours or somebody else's, back in."""

from pathlib import Path

import jax.numpy as jnp
from flax import nnx

from experiment_runs.errors import UserError, brief
from experiment_runs.foreign import readable
from rlhf_jax.language_model.decoder import DecoderConfig
from rlhf_jax.pretrained.hub import model_files
from rlhf_jax.pretrained.loading import check_weights, read_config, stored_tensors
from rlhf_jax.pretrained.tensor_names import abstract, decoder_state
from rlhf_jax.pretrained.tokenizer import Tokenizer
from rlhf_jax.reward_model.model import FrozenRewardModel, RewardModel


def load_reward_model(
    path: Path, tokenizer: Tokenizer, *, dtype: str = "float32"
) -> FrozenRewardModel:
    """A reward model from a directory in transformers' layout, ours or somebody else's.

    Other trainers render a whole conversation in the chat template and read the last token of it,
    which in most templates is not the end of the response but what the template writes after it.

    Args:
      path: holds config.json, safetensors and the tokenizer.
      tokenizer: of the policy whose responses are to be scored.
      dtype: of the activations.

    Raises:
      UserError: it is not a sequence classifier with one label, of a supported family, or it reads
        tokens that mean something else to the policy.
    """
    model_files(path)
    with readable(path, "a reward model"):
        return read_reward_model(path, tokenizer, dtype=dtype)


def read_reward_model(path: Path, tokenizer: Tokenizer, *, dtype: str) -> FrozenRewardModel:
    config, tensors = read_config(path), stored_tensors(path)
    architecture = (config.get("architectures") or ["nothing"])[0]
    weight = tensors.pop("score.weight", None)
    if not architecture.endswith("ForSequenceClassification") or weight is None:
        raise UserError(
            f"{path}: holds {architecture}, {'no' if weight is None else 'a'} score.weight; "
            "a reward model is a ...ForSequenceClassification with one"
        )
    if weight.shape[0] != 1:
        raise UserError(f"{path}: has {weight.shape[0]} labels; a reward model has one")
    # Its output matrix is the head; without this the decoder would ask for one of its own.
    cfg = DecoderConfig.from_huggingface(config | {"tie_word_embeddings": True}, dtype=dtype)
    theirs = Tokenizer.from_folder(path, embeddings=cfg.vocab_size)
    if reading(theirs) != reading(tokenizer):
        raise UserError(
            f"{path}: its tokenizer or chat template is not the policy's; use a reward model of "
            "the same family"
        )
    state = decoder_state(cfg, tensors, source=str(path))
    check_weights(state, path)
    model = RewardModel(nnx.merge(nnx.split(abstract(cfg))[0], state), rngs=nnx.Rngs(0))
    head, offset = jnp.asarray(weight.read(), jnp.float32), config.get("reward_offset", 0.0)
    if not jnp.isfinite(head).all():
        raise UserError(f"{path}: score.weight is not finite; download the weights again")
    if type(offset) not in (int, float) or not abs(offset) < 3e38:
        raise UserError(
            f"{path}/config.json: reward_offset is {brief(offset)}, not a finite number; "
            "download it again"
        )
    model.score.kernel[...] = head
    if "reward_offset" in config:  # one of ours, which reads the end itself
        model.offset[...] = jnp.float32(offset)
    else:
        model.tail = read_after_end(theirs, config.get("pad_token_id"), path)
    return FrozenRewardModel(*nnx.split(model))


def read_after_end(tokenizer: Tokenizer, pad: int | None, path: Path) -> tuple[int, ...] | None:
    """What a reward model of transformers reads after the end; None where it stops before it.

    It takes its score at the last token of its template that is not its pad token, which in many
    models is the end itself.
    """
    whole = [*tokenizer.closing, *tokenizer.tail]
    while whole and whole[-1] == pad:
        whole.pop()
    if not whole and len(tokenizer.closing) == 1:
        return None
    if len(whole) < len(tokenizer.closing):
        raise UserError(
            f"{path}: its pad token {pad} is the last of several tokens that end a response, so "
            "that its score is read between them, which is not supported; use another reward model"
        )
    return tuple(whole[len(tokenizer.closing) :])


def reading(tokenizer: Tokenizer) -> tuple:
    """What must be alike for two models to read the same tokens as the same text."""
    around = tokenizer.prefix, tokenizer.suffix, tokenizer.closing
    return *around, tokenizer.huggingface.get_vocab()

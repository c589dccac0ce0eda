"""Exports in the Hugging Face layouts, and a reward model of that layout back in.

Weights are safetensors in float32 under the names that transformers and PEFT use; nothing is
pickled. Every export is a directory with its configuration, tokenizer and model card.
"""

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from flax import nnx
from transformers import AutoTokenizer

from reporting.runs import Run, UserError, write_text
from rlhf_jax import judge as judges
from rlhf_jax import model_card, ppo
from rlhf_jax.config import PPOConfig, lora_config
from rlhf_jax.judge import Judge, RewardModel
from rlhf_jax.model import LINEAR_LAYERS, Decoder, DecoderConfig, LoRAConfig
from rlhf_jax.pretrained import (
    Pretrained,
    abstract,
    decoder_state,
    huggingface_tensors,
    leaf_name,
    read_directory,
    tensor_table,
)
from rlhf_jax.tokenizer import Tokenizer

ARCHITECTURES = {"llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3"}
# fields of a config.json that would no longer be true, or that name code to run
DROPPED = (
    "_name_or_path",
    "auto_map",
    "quantization_config",
    "torch_dtype",
    "transformers_version",
)


def export_run(run: Run, pretrained: Pretrained, out: Path, *, merged: bool = False) -> None:
    """Writes what a finished run trained into a new directory.

    Args:
      run: of a stage that trains a reward model or a policy, with its weights.
      pretrained: the model that it started from.
      out: the directory; it must not hold anything yet.
      merged: write a model with its adapters added to its weights, not adapters beside a model.

    Raises:
      UserError: there is nothing to export, or something in the way.
    """
    kind = run.stage.partition("-")[0]  # "ppo-lora-1" is of kind "ppo"
    weights = {"reward": "best", "gold": "best", "ppo": "policy"}.get(kind)
    if weights is None:
        raise UserError(f"{run.path}: a run of stage {run.stage!r} has no weights to export")
    if not run.finished:
        raise UserError(f"{run.path}: the run is not finished; train it to the end first")
    if not (run.checkpoints / weights).is_dir():
        raise UserError(f"{run.path}: the weights are not there; committed runs have none")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out}: is there already; name another folder or remove it")
    lora = None if merged else lora_config(run.config["lora"])
    plain = out if lora is None else out / "base"
    if weights == "best":
        model, card = nnx.merge(*judges.load(run, pretrained)), model_card.reward_card
        decoder, head = model.decoder, head_weight(model)
        model.decoder = merged_adapters(decoder) if merged else decoder
        export_reward_model(Judge(*nnx.split(model)), pretrained, plain)
    else:
        cfg, card = ppo_config(run), model_card.policy_card
        decoder, head = nnx.merge(*ppo.tuned_decoder(run, cfg, pretrained)), None
        whole = merged_adapters(decoder) if merged else decoder
        export_policy(whole, pretrained, plain, generation_settings(cfg))
    if lora is not None:
        export_adapter(decoder, lora, pretrained, out, head=head)
    write_text(out / "README.md", card(run, adapter=lora is not None))


def merged_adapters(decoder: Decoder) -> Decoder:
    """A copy without adapters: the product of each is added to the weight beside it."""
    decoder = nnx.merge(*nnx.split(decoder), copy=True)  # the weights may be the pretrained model's
    for block in decoder.blocks:
        layers = {**vars(block.attention), **vars(block.mlp)}
        for layer in (layers[name] for name in LINEAR_LAYERS if name in layers):
            if layer.lora_a is not None:
                layer.kernel[...] += layer.scale * (layer.lora_b[...] @ layer.lora_a[...])
                layer.lora_a = layer.lora_b = nnx.data(None)
    return decoder


def ppo_config(run: Run) -> PPOConfig:
    """The configuration of a PPO run."""
    return PPOConfig(**run.config | {"lora": lora_config(run.config["lora"])})


def generation_settings(cfg: PPOConfig) -> dict[str, Any]:
    """Sampling as in training: the whole distribution at its temperature."""
    return {
        "do_sample": True,
        "temperature": cfg.temperature,
        "top_k": 0,
        "top_p": 1.0,
        "max_new_tokens": cfg.response_tokens,
    }


def export_policy(
    decoder: Decoder, pretrained: Pretrained, out: Path, generation: Mapping[str, Any]
) -> None:
    """Writes a decoder, without its adapters, in transformers' layout for causal models."""
    out.mkdir(parents=True, exist_ok=True)
    tokenizer = pretrained.tokenizer
    config = huggingface_config(pretrained, head="ForCausalLM")
    write_json(out / "config.json", config)
    ends = {"eos_token_id": tokenizer.end, "pad_token_id": tokenizer.pad}
    write_json(out / "generation_config.json", {**generation, **ends})
    save_tensors(
        out / "model.safetensors", huggingface_tensors(nnx.state(decoder), pretrained.config)
    )
    save_tokenizer(tokenizer, out, padding_side="left")


def export_reward_model(judge: Judge, pretrained: Pretrained, out: Path) -> None:
    """Writes a reward model as a sequence classifier with one label.

    Its head has no bias. The gain goes into the weight, what remains to be subtracted from a score
    into the configuration: reward = score - reward_offset.
    """
    out.mkdir(parents=True, exist_ok=True)
    model = nnx.merge(*judge)
    tensors = huggingface_tensors(nnx.state(model.decoder), pretrained.config)
    tensors.pop("lm_head.weight", None)
    tensors["score.weight"] = head_weight(model)
    config = huggingface_config(
        pretrained,
        head="ForSequenceClassification",
        id2label={"0": "LABEL_0"},
        label2id={"LABEL_0": 0},
        problem_type="regression",  # pipelines then show the score, not its sigmoid
        reward_offset=float(model.gain[...] * model.offset[...]),
    )
    write_json(out / "config.json", config)
    save_tensors(out / "model.safetensors", tensors)
    save_tokenizer(pretrained.tokenizer, out, padding_side="right")


def head_weight(model: RewardModel) -> np.ndarray:
    """The head as a matrix of one row, with the gain in it."""
    return np.float32(model.gain[...]) * np.asarray(model.score.kernel[...], np.float32)


def export_adapter(
    decoder: Decoder,
    lora: LoRAConfig,
    pretrained: Pretrained,
    out: Path,
    *,
    head: np.ndarray | None = None,
) -> None:
    """Writes the adapters of a decoder in PEFT's layout; the base model is in `out/base`.

    With a head it is the adapter of a sequence classifier, which is saved whole.
    """
    out.mkdir(parents=True, exist_ok=True)
    alpha = int(lora.alpha) if lora.alpha == int(lora.alpha) else lora.alpha
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM" if head is None else "SEQ_CLS",
        "base_model_name_or_path": str((out / "base").resolve()),
        "revision": None,
        "inference_mode": True,
        "r": lora.rank,
        "lora_alpha": alpha,
        "lora_dropout": lora.dropout,
        "target_modules": sorted(lora.targets),
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "use_rslora": False,
        "use_dora": False,
        "modules_to_save": None if head is None else ["score"],
        "layers_to_transform": None,
        "layers_pattern": None,
        "rank_pattern": {},
        "alpha_pattern": {},
    }
    write_json(out / "adapter_config.json", config)
    tensors = adapter_tensors(decoder)
    if head is not None:
        tensors["base_model.model.score.weight"] = head
    save_tensors(out / "adapter_model.safetensors", tensors)
    side = "left" if head is None else "right"
    save_tokenizer(pretrained.tokenizer, out, padding_side=side)


def adapter_tensors(decoder: Decoder) -> dict[str, np.ndarray]:
    """The low-rank factors under PEFT's names, A as [rank, inputs], B as [outputs, rank]."""
    leaves = {
        leaf_name(path): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(nnx.state(decoder))
    }
    tensors = {}
    for ours, theirs, _ in tensor_table(decoder.cfg):
        if (factors := ours.removesuffix("kernel") + "lora_a") not in leaves:
            continue
        for ending, name in (("lora_a", "lora_A"), ("lora_b", "lora_B")):
            values = np.asarray(leaves[factors.removesuffix("lora_a") + ending], np.float32)
            tensors[f"base_model.model.{theirs.removesuffix('weight')}{name}.weight"] = values
    return tensors


def huggingface_config(pretrained: Pretrained, *, head: str, **changes: Any) -> dict[str, Any]:
    """The original config.json, with what is different about the export."""
    kept = {k: v for k, v in pretrained.huggingface_config.items() if k not in DROPPED}
    return kept | {
        "architectures": [ARCHITECTURES[pretrained.config.family] + head],
        "dtype": "float32",
        "rope_theta": pretrained.config.rope_theta,  # for readers that know no rope_parameters
        "eos_token_id": pretrained.tokenizer.end,
        "pad_token_id": pretrained.tokenizer.pad,
        **changes,
    }


def save_tensors(path: Path, tensors: Mapping[str, np.ndarray]) -> None:
    safetensors.numpy.save_file(dict(tensors), path, metadata={"format": "pt"})


def save_tokenizer(tokenizer: Tokenizer, out: Path, *, padding_side: str) -> None:
    """Writes the tokenizer with its chat template and the pad token that the training used."""
    saved = copy.deepcopy(tokenizer.huggingface)
    saved.pad_token = saved.convert_ids_to_tokens(tokenizer.pad)
    saved.padding_side = saved.init_kwargs["padding_side"] = padding_side  # both, or it is lost
    saved.save_pretrained(out)


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    write_text(path, json.dumps(value, indent=2) + "\n")


def load_reward_model(path: Path, tokenizer: Tokenizer, *, dtype: str = "float32") -> Judge:
    """A reward model from a directory in transformers' layout, ours or somebody else's.

    Args:
      path: holds config.json, safetensors and the tokenizer.
      tokenizer: of the policy whose responses are to be scored.
      dtype: of the activations.

    Raises:
      UserError: it is not a sequence classifier with one label, of a supported family, or it reads
        tokens that mean something else to the policy.
    """
    config, tensors = read_directory(path)
    architecture = (config.get("architectures") or ["nothing"])[0]
    weight = tensors.pop("score.weight", None)
    if not architecture.endswith("ForSequenceClassification") or weight is None:
        raise UserError(
            f"{path}: holds {architecture}, {'no' if weight is None else 'a'} score.weight; "
            "a reward model is a ...ForSequenceClassification with one"
        )
    if weight.shape[0] != 1:
        raise UserError(f"{path}: has {weight.shape[0]} labels; a reward model has one")
    theirs = Tokenizer.of(AutoTokenizer.from_pretrained(path, trust_remote_code=False))
    if reading(theirs) != reading(tokenizer):
        raise UserError(
            f"{path}: its tokenizer or chat template is not the policy's; use a reward model of "
            "the same family"
        )
    # Its output matrix is the head; without this the decoder would ask for one of its own.
    cfg = DecoderConfig.from_huggingface(config | {"tie_word_embeddings": True}, dtype=dtype)
    state = decoder_state(cfg, tensors, source=str(path))
    model = RewardModel(nnx.merge(nnx.split(abstract(cfg))[0], state), rngs=nnx.Rngs(0))
    model.score.kernel[...] = jnp.asarray(weight, jnp.float32)
    model.offset[...] = jnp.float32(config.get("reward_offset", 0.0))
    return Judge(*nnx.split(model))


def reading(tokenizer: Tokenizer) -> tuple:
    """What must be alike for two models to read the same tokens as the same text."""
    return tokenizer.prefix, tokenizer.suffix, tokenizer.end, tokenizer.huggingface.get_vocab()

"""Exports in the Hugging Face layouts, and a reward model of that layout back in.

Weights are safetensors in float32 under the names that transformers and PEFT use; nothing is
pickled. Every export is a directory with its configuration, tokenizer and model card.
"""

import copy
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import safetensors.numpy
from flax import nnx

from experiment_runs.checkpoints import written
from experiment_runs.errors import UserError
from experiment_runs.files import write_text
from experiment_runs.foreign import check_fetched
from experiment_runs.run import Run
from rlhf_jax.config import LINEAR_LAYERS, LoRAConfig, PPOConfig, lora_config, ppo_config
from rlhf_jax.export import model_card
from rlhf_jax.language_model.config_fields import FAMILIES
from rlhf_jax.language_model.decoder import Decoder
from rlhf_jax.ppo import training as ppo_training
from rlhf_jax.pretrained.hub import TOKENIZERS
from rlhf_jax.pretrained.model import Pretrained
from rlhf_jax.pretrained.tensor_names import (
    huggingface_tensors,
    leaf_name,
    tensor_table,
)
from rlhf_jax.pretrained.tokenizer import Tokenizer
from rlhf_jax.reward_model import model as reward_models
from rlhf_jax.reward_model.model import FrozenRewardModel, RewardModel

# fields of a config.json that would no longer be true, or that name code to run
DROPPED = (
    "_name_or_path",
    "auto_map",
    "quantization_config",
    "rope_parameters",
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
    weights = {"reward": "best", "second_reward": "best", "ppo": "policy"}.get(kind)
    if weights is None:
        raise UserError(f"{run.path}: a run of stage {run.stage!r} has no weights to export")
    run.require_finished()
    if not (run.checkpoints / weights).is_dir():
        raise UserError(f"{run.path}: the weights are not there; committed runs have none")
    if not is_free(out):
        raise UserError(f"{out}: is there already; name another folder or remove it")
    lora = None if merged else lora_config(run.config["lora"])
    plain = out if lora is None else out / "base"
    if weights == "best":
        model, card = nnx.merge(*reward_models.load(run, pretrained)), model_card.reward_card
        decoder, head = model.decoder, head_weight(model)
        model.decoder = merged_adapters(decoder) if merged else decoder
        export_reward_model(FrozenRewardModel(*nnx.split(model)), pretrained, plain)
    else:
        cfg, card = ppo_config(run.config), model_card.policy_card
        decoder, head = nnx.merge(*ppo_training.tuned_decoder(run, cfg, pretrained)), None
        whole = merged_adapters(decoder) if merged else decoder
        export_policy(whole, pretrained, plain, generation_settings(cfg))
    if lora is not None:
        export_adapter(decoder, lora, pretrained, out, head=head)
    text = card(run, pretrained.tokenizer, adapter=lora is not None)
    write_text(out / "README.md", text)


def is_free(folder: Path) -> bool:
    """Whether nothing is there, or an empty directory."""
    return not folder.exists() or (folder.is_dir() and not any(folder.iterdir()))


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
    ends = {"eos_token_id": every_end(tokenizer), "pad_token_id": tokenizer.pad}
    write_json(out / "generation_config.json", {**generation, **ends})
    save_tensors(
        out / "model.safetensors", huggingface_tensors(nnx.state(decoder), pretrained.config)
    )
    save_tokenizer(tokenizer, out, padding_side="left")


def export_reward_model(reward_model: FrozenRewardModel, pretrained: Pretrained, out: Path) -> None:
    """Writes a reward model as a sequence classifier with one label.

    Its head has no bias. The gain goes into the weight, what remains to be subtracted from a score
    into the configuration: reward = score - reward_offset.
    """
    out.mkdir(parents=True, exist_ok=True)
    model = nnx.merge(*reward_model)
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
    decoder = pretrained.config
    family = FAMILIES[decoder.family].architecture
    if (family, head) == ("Gemma3", "ForSequenceClassification"):
        family = "Gemma3Text"  # without it, the classifier of texts and images
    # As every version of transformers reads it; version 5 alone knows rope_parameters.
    rope = {"rope_theta": decoder.rope_theta, "rope_scaling": None}
    if decoder.rope_scaling:
        scaling = dict(decoder.rope_scaling)
        rope["rope_scaling"] = {"rope_type": scaling.pop("kind"), **scaling}
    if decoder.window_rope_theta is not None:
        rope["rope_local_base_freq"] = decoder.window_rope_theta
    return kept | {
        "architectures": [family + head],
        "dtype": "float32",
        **rope,
        "eos_token_id": every_end(pretrained.tokenizer),
        "pad_token_id": pretrained.tokenizer.pad,
        **changes,
    }


def every_end(tokenizer: Tokenizer) -> int | list[int]:
    """What ends a response, as transformers writes it: one token, or the list of all."""
    return tokenizer.end if len(tokenizer.ends) == 1 else list(tokenizer.ends)


def save_tensors(path: Path, tensors: Mapping[str, np.ndarray]) -> None:
    with written(path):
        safetensors.numpy.save_file(dict(tensors), path, metadata={"format": "pt"})


def save_tokenizer(tokenizer: Tokenizer, out: Path, *, padding_side: str) -> None:
    """Writes the tokenizer with its chat template and the pad token that the training used."""
    saved = copy.deepcopy(tokenizer.huggingface)
    saved.pad_token = saved.convert_ids_to_tokens(tokenizer.pad)
    saved.padding_side = saved.init_kwargs["padding_side"] = padding_side  # both, or it is lost
    with written(out):
        saved.save_pretrained(out)
    # The class by the name that every version of transformers knows, which reads the file as it is;
    # the template where programs look for it that read no *.jinja.
    file = out / "tokenizer_config.json"
    config = json.loads(file.read_text()) | {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_input_names": ["input_ids", "attention_mask"],
        "chat_template": saved.chat_template,
    }
    config.pop("backend", None)
    if isinstance(config.get("extra_special_tokens"), list):  # version 4 knows another name
        config["additional_special_tokens"] = config.pop("extra_special_tokens")
    write_json(file, config)
    if name := saved.name_or_path:  # of the folder that it was read from
        for source in (file for pattern in TOKENIZERS for file in Path(name).glob(pattern)):
            check_fetched(source)
            shutil.copyfile(source, out / source.name)


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    write_text(path, json.dumps(value, indent=2) + "\n")

import copy
import dataclasses
import json
import resource

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml
from flax import nnx
from safetensors import safe_open
from transformers import AutoTokenizer

from experiment_runs.checkpoints import save_weights
from experiment_runs.errors import UserError
from experiment_runs.run import ensure
from rlhf_jax.config import EvaluationConfig, LoRAConfig, PPOConfig, RewardConfig
from rlhf_jax.export import foreign_reward_model, huggingface
from rlhf_jax.ppo import actor_critic
from rlhf_jax.pretrained import loading
from rlhf_jax.pretrained.tokenizer import Tokenizer
from rlhf_jax.reward_model import model as reward_models

REWARD_STAGES = ("reward", "second_reward")
KINDS = ("reward", "reward+lora", "second_reward", "ppo-full", "ppo-lora", "ppo-lora-1")
LORA = LoRAConfig(rank=4, targets=("q_proj", "v_proj", "down_proj"))
ABOUT = {
    "model": {"name": "acme/small", "file": "abc"},
    "preferences": {
        "name": "stanfordnlp/SHP", "kind": "hub", "rows": 5, "licence": "research",
    },
    "prompts": {"name": "own questions", "kind": "local", "rows": 4, "licence": "own"},
}  # fmt: skip
SUMMARY = {
    "reward": {
        "accuracy": {"value": 0.71, "low": 0.6, "high": 0.8, "count": 9},
        "baselines": {"longer": {"accuracy": {"value": 0.66, "low": 0.5, "high": 0.8, "count": 9}}},
        "length_correlation": 0.43,
        "scale": {"offset": 0.7, "gain": 2.5},
    },
    "ppo": {"reward_last_quarter": 0.3, "kl_last_quarter": 0.04, "trained_parameters": {"x": 9}},
}
PROMPT = "Is <b>this</b> safe?"


def noisy(state, scale=0.3, seed=1):
    """A state that training might have left: nothing in it is zero or one any more."""
    leaves, tree = jax.tree.flatten(state)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    moved = [x + scale * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)]
    return jax.tree.unflatten(tree, moved)


def finished(kind, model, root):
    """A run as training leaves it."""
    stage, lora = kind.removesuffix("+lora"), LORA if "lora" in kind else None
    if stage in REWARD_STAGES:
        cfg, name, summary = RewardConfig(lora=lora), "best", SUMMARY["reward"]
        weights = noisy(reward_models.initial(model, cfg.seed, lora)[1])
    else:
        cfg = PPOConfig(lora=lora, response_tokens=16)
        name, summary = "policy", SUMMARY["ppo"]
        weights = noisy(actor_critic.build(model, cfg.lora, seed=cfg.seed).trainable)

    def train(run):
        save_weights(run.checkpoints / name, weights)
        run.finish(**summary)

    return ensure(stage, cfg, train, inputs={"model": "x"}, about=ABOUT, root=root)


@pytest.fixture(scope="module", params=KINDS)
def exported(request, model, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    run = finished(request.param, model, folder / "runs")
    huggingface.export_run(run, model, folder / "out")
    return run, folder / "out"


def tensors_in(path):
    with safe_open(path, framework="numpy") as file:
        assert file.metadata() == {"format": "pt"}
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def test_directory_holds_no_pickle_and_all_that_a_loader_looks_for(exported):
    run, out = exported
    names = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}
    tokenizer = {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
    whole = {"config.json", "model.safetensors", *tokenizer}
    if run.stage not in REWARD_STAGES:
        whole.add("generation_config.json")
    if run.config["lora"]:
        whole = {f"base/{name}" for name in whole}
        whole |= {"adapter_config.json", "adapter_model.safetensors", *tokenizer}
    assert names == whole | {"README.md"}


def test_exported_tokenizer_has_a_class_and_a_template_that_every_version_finds(exported):
    _, folder = exported
    config = json.loads((folder / "tokenizer_config.json").read_text())
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert config["model_input_names"] == ["input_ids", "attention_mask"]
    assert config["chat_template"] == (folder / "chat_template.jinja").read_text()


def test_the_reader_of_llama_cpps_converter_finds_the_special_tokens_and_the_template(
    exported, model
):
    _, folder = exported
    found = gguf.SpecialVocab(folder)
    own = model.tokenizer
    assert {"eos": own.end, "pad": own.pad}.items() <= found.special_token_ids.items()
    assert found.chat_template == own.huggingface.chat_template


def test_an_export_keeps_the_tokenizers_of_other_programs_of_the_folder_that_was_read(
    model, tmp_path
):
    source, out = tmp_path / "source", tmp_path / "out"
    model.tokenizer.huggingface.save_pretrained(source)
    others = ("tokenizer.model", "tokenizer.model.v3", "tekken.json", "added_tokens.json")
    for name in others:
        (source / name).write_text("{}")
    (source / "pytorch_model.bin").write_bytes(b"pickle")
    tokenizer = Tokenizer.from_folder(source, embeddings=model.config.vocab_size)
    huggingface.save_tokenizer(tokenizer, out, padding_side="left")
    assert {(out / name).read_text() for name in others} == {"{}"}
    assert not (out / "pytorch_model.bin").exists()
    (source / "tokenizer.model").write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(UserError, match="git lfs pull"):
        huggingface.save_tokenizer(tokenizer, out, padding_side="left")


def test_exported_tokenizer_pads_with_another_token_than_the_end(exported, model):
    run, out = exported
    loaded = AutoTokenizer.from_pretrained(out)
    assert loaded.pad_token_id == model.tokenizer.pad != loaded.eos_token_id == model.tokenizer.end
    assert loaded.padding_side == ("right" if run.stage in REWARD_STAGES else "left")
    assert model.tokenizer.encode(["<|im_end|>"]) != [[model.tokenizer.end]]  # ours is as it was


def test_tokenizer_that_pads_with_its_end_is_exported_with_another_pad_and_left_as_it_was(
    model, tmp_path
):
    theirs = copy.deepcopy(model.tokenizer.huggingface)
    theirs.pad_token = theirs.eos_token
    own = dataclasses.replace(model.tokenizer, huggingface=theirs)
    huggingface.save_tokenizer(own, tmp_path, padding_side="left")
    assert AutoTokenizer.from_pretrained(tmp_path).pad_token_id == own.pad
    assert (theirs.pad_token, theirs.padding_side) == (theirs.eos_token, "right")


def test_card_gives_the_prompt_that_the_training_used(exported, model):
    _, out = exported
    card = (out / "README.md").read_text()
    code = card.split("messages = ")[1].split("\ninputs")[0]
    scope = {"tokenizer": AutoTokenizer.from_pretrained(out), "question": PROMPT, "answer": ""}
    exec(f"messages = {code}", scope)
    tokens = scope["tokenizer"](scope["prompt"], add_special_tokens=False)["input_ids"]
    own = model.tokenizer
    assert tuple(tokens) == (*own.prefix, *own.encode([PROMPT])[0], *own.suffix)


def test_card_states_what_it_is_and_what_it_cannot_do(exported):
    run, out = exported
    _, header, body = (out / "README.md").read_text().split("---\n", 2)
    fields = yaml.safe_load(header)
    assert fields["base_model"] == "acme/small"
    assert fields["datasets"] == ["stanfordnlp/SHP"]
    lora = run.config["lora"]
    assert fields["base_model_relation"] == ("adapter" if lora else "finetune")
    assert fields["library_name"] == ("peft" if lora else "transformers")
    task = "text-classification" if run.stage in REWARD_STAGES else "text-generation"
    assert fields["pipeline_tag"] == task
    result = fields["model-index"][0]["results"][0]
    measured_on = "stanfordnlp/SHP" if run.stage in REWARD_STAGES else "own questions"
    assert result["dataset"]["name"] == measured_on
    assert result["metrics"][0]["value"] == (0.71 if run.stage in REWARD_STAGES else 0.3)
    assert "| learning_rate | " in body and "| seed | 0 |" in body
    assert ("0.43" in body) == (run.stage in REWARD_STAGES)
    limits = body.split("## Limits")[1]
    assert "onger answer" in limits
    assert ("--dtype float32" in limits) == (not lora)
    assert ("max_new_tokens" in limits) == (run.stage not in REWARD_STAGES)


def test_base_model_without_a_hub_id_is_not_named_as_one(model, tmp_path, monkeypatch):
    monkeypatch.setitem(ABOUT, "model", {"name": str(tmp_path), "file": "abc"})
    huggingface.export_run(finished("ppo-full", model, tmp_path / "runs"), model, tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "base_model:" not in card and str(tmp_path) not in card


def test_policy_comes_back_as_it_was(model, tmp_path):
    run = finished("ppo-full", model, tmp_path / "runs")
    huggingface.export_run(run, model, tmp_path / "out")
    again = loading.load_directory(tmp_path / "out", name="again")
    trained = actor_critic.build(model, None, seed=0)._replace(
        trainable=noisy(actor_critic.build(model, None, seed=0).trainable)
    )
    jax.tree.map(np.testing.assert_array_equal, again.state, trained.decoder()[1])
    settings = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert settings["top_k"] == 0 and settings["top_p"] == 1 and settings["max_new_tokens"] == 16


def test_adapter_keeps_the_base_model_and_adds_its_own_product(model, tmp_path):
    run = finished("ppo-lora", model, tmp_path / "runs")
    huggingface.export_run(run, model, tmp_path / "out")
    base = loading.load_directory(tmp_path / "out" / "base", name="base")
    jax.tree.map(np.testing.assert_array_equal, base.state, model.state)
    tensors = tensors_in(tmp_path / "out" / "adapter_model.safetensors")
    assert len(tensors) == 2 * 3 * 2  # layers, targets, factors
    prefix = "base_model.model.model.layers.1.mlp.down_proj"
    a, b = (tensors[f"{prefix}.lora_{x}.weight"] for x in "AB")
    assert a.shape == (4, 64) and b.shape == (32, 4)
    trained = noisy(actor_critic.build(model, LORA, seed=0).trainable)
    own = trained["decoder"]["blocks"][1]["mlp"]["down_proj"]
    np.testing.assert_array_equal(a, own["lora_a"][...])
    np.testing.assert_array_equal(b, own["lora_b"][...])
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (4, 32)
    assert config["target_modules"] == ["down_proj", "q_proj", "v_proj"]


def episodes(model):
    rows = jax.random.randint(jax.random.key(0), (3, 20), 4, model.tokenizer.vocab_size)
    return rows, jnp.arange(20)[None] < jnp.array([[20], [13], [7]])


def scores(reward_model, tokens, mask):
    return jax.jit(lambda state: nnx.merge(reward_model.definition, state)(tokens, mask))(
        reward_model.state
    )


def test_reward_model_comes_back_with_the_same_rewards(model, tmp_path):
    run = finished("reward", model, tmp_path / "runs")
    huggingface.export_run(run, model, tmp_path / "out")
    both = (
        reward_models.load(run, model),
        foreign_reward_model.load_reward_model(tmp_path / "out", model.tokenizer),
    )
    one, other = (scores(reward_model, *episodes(model)) for reward_model in both)
    np.testing.assert_allclose(one, other, rtol=1e-4)
    assert one.std() > 0.1
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["reward_offset"] == pytest.approx(0.7 * 2.5)
    tensors = tensors_in(tmp_path / "out" / "model.safetensors")
    assert tensors["score.weight"].shape == (1, 32) and "lm_head.weight" not in tensors


def test_merged_adapters_of_a_reward_model_give_its_rewards(model, tmp_path):
    run, before = (
        finished("reward+lora", model, tmp_path / "runs"),
        jax.tree.map(jnp.copy, model.state),
    )
    huggingface.export_run(run, model, tmp_path / "out", merged=True)
    jax.tree.map(np.testing.assert_array_equal, model.state, before)
    assert not (tmp_path / "out" / "base").exists()
    assert "peft" not in (tmp_path / "out" / "README.md").read_text()
    merged = foreign_reward_model.load_reward_model(tmp_path / "out", model.tokenizer)
    own = reward_models.load(run, model)
    one, other = (scores(reward_model, *episodes(model)) for reward_model in (own, merged))
    np.testing.assert_allclose(one, other, atol=1e-5)
    plain = nnx.merge(*own)
    for block in plain.decoder.blocks:
        block.attention.q_proj.lora_b[...] = jnp.zeros_like(block.attention.q_proj.lora_b[...])
    without = scores(reward_models.FrozenRewardModel(*nnx.split(plain)), *episodes(model))
    assert np.abs(one - without).max() > 1e-2  # the adapters matter


def test_adapter_of_a_reward_model_brings_its_head(model, tmp_path):
    run = finished("reward+lora", model, tmp_path / "runs")
    huggingface.export_run(run, model, tmp_path / "out")
    tensors = tensors_in(tmp_path / "out" / "adapter_model.safetensors")
    head = tensors["base_model.model.score.weight"]
    kernel = nnx.merge(*reward_models.load(run, model)).score.kernel[...]
    np.testing.assert_allclose(head, 2.5 * kernel, rtol=1e-6)
    assert len(tensors) == 2 * 3 * 2 + 1  # layers, targets, factors; the head
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["task_type"], config["modules_to_save"]) == ("SEQ_CLS", ["score"])


def test_foreign_directories_are_refused_with_the_reason(model, tmp_path):
    run = finished("reward", model, tmp_path / "runs")
    out = tmp_path / "out"
    huggingface.export_run(run, model, out)
    renamed = dataclasses.replace(model.tokenizer, suffix=(1, 2))
    with pytest.raises(UserError, match="chat template is not the policy's"):
        foreign_reward_model.load_reward_model(out, renamed)
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(config | {"architectures": ["LlamaForCausalLM"]}))
    with pytest.raises(UserError, match="holds LlamaForCausalLM"):
        foreign_reward_model.load_reward_model(out, model.tokenizer)
    (out / "config.json").write_text(json.dumps(config))
    tensors = tensors_in(out / "model.safetensors")
    for offset in (float("nan"), 1e300, "0", None, True):
        (out / "config.json").write_text(json.dumps(config | {"reward_offset": offset}))
        with pytest.raises(UserError, match="not a finite number"):
            foreign_reward_model.load_reward_model(out, model.tokenizer)
    (out / "config.json").write_text(json.dumps(config))
    broken = tensors | {"score.weight": tensors["score.weight"] * np.float32("nan")}
    huggingface.save_tensors(out / "model.safetensors", broken)
    with pytest.raises(UserError, match="score.weight is not finite"):
        foreign_reward_model.load_reward_model(out, model.tokenizer)
    tensors["score.weight"] = np.repeat(tensors["score.weight"], 2, axis=0)
    huggingface.save_tensors(out / "model.safetensors", tensors)
    with pytest.raises(UserError, match="has 2 labels"):
        foreign_reward_model.load_reward_model(out, model.tokenizer)
    (out / "model.safetensors").unlink()
    with pytest.raises(UserError, match="pickled weights"):
        foreign_reward_model.load_reward_model(out, model.tokenizer)
    with pytest.raises(UserError, match="missing"):
        foreign_reward_model.load_reward_model(tmp_path / "nowhere", model.tokenizer)


def test_a_disk_that_is_full_is_one_message(model, tmp_path):
    """Safetensors and tokenizers raise errors of kinds of their own, none of them the system's."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with pytest.raises(UserError, match="m.safetensors: cannot be written .*make room"):
            huggingface.save_tensors(tmp_path / "m.safetensors", {"a": np.zeros(9999)})
        with pytest.raises(UserError, match="cannot be written .*make room"):
            huggingface.save_tokenizer(model.tokenizer, tmp_path, padding_side="left")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_run_without_weights_is_refused_with_the_reason(model, tmp_path):
    evaluation = ensure(
        "evaluate", EvaluationConfig(), lambda run: run.finish(), inputs={}, root=tmp_path
    )
    bare = ensure(
        "reward", RewardConfig(seed=1), lambda run: run.finish(), inputs={}, root=tmp_path
    )
    with pytest.raises(UserError, match="stage 'evaluate' has no weights"):
        huggingface.export_run(evaluation, model, tmp_path / "out")
    with pytest.raises(UserError, match="committed runs have none"):
        huggingface.export_run(bare, model, tmp_path / "out")
    (bare.path / "summary.json").unlink()
    with pytest.raises(UserError, match="not finished"):
        huggingface.export_run(bare, model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_nothing_is_written_over(model, tmp_path):
    run = finished("reward", model, tmp_path / "runs")
    (tmp_path / "file").write_text("mine")
    for taken in (tmp_path, tmp_path / "file"):
        with pytest.raises(UserError, match="is there already"):
            huggingface.export_run(run, model, taken)
    assert (tmp_path / "file").read_text() == "mine"

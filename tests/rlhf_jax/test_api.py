"""The public names: what they promise, that they do it, and what they say of bad input."""

import inspect
import os
import pydoc
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

import rlhf_jax
from experiment_runs.errors import UserError
from rlhf_jax import api
from rlhf_jax.config import PPOConfig

ROOT = Path(__file__).resolve().parent.parent.parent
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
SIGNATURES = {
    "load": "model, *, dtype='float32'",
    "train_reward_model": "model, pairs, *, config=None, out=None",
    "train_policy": "model, prompts, *, reward, config=None, out=None",
    "generate": "model, prompts, *, prompt_tokens=256, response_tokens=128, temperature=1.0, "
    "seed=0, batch=32",
    "evaluate": "models, prompts, *, rewards, config=None, prompt_tokens=256, response_tokens=128",
}
SCORE = "self, prompts, responses, *, batch=16"


def parameters(function):
    found = inspect.signature(function)
    bare = [p.replace(annotation=inspect.Parameter.empty) for p in found.parameters.values()]
    text = str(found.replace(parameters=bare, return_annotation=inspect.Signature.empty))
    return text.removeprefix("(").removesuffix(")")


def test_the_signatures_of_the_public_names_are_what_callers_rely_on():
    assert {name: parameters(getattr(rlhf_jax, name)) for name in SIGNATURES} == SIGNATURES
    assert parameters(rlhf_jax.TrainedRewardModel.score) == SCORE
    assert {*SIGNATURES} < {*rlhf_jax.__all__} <= {*dir(rlhf_jax)}


def test_the_documentation_of_the_package_names_every_function_with_its_arguments():
    text = pydoc.plain(pydoc.render_doc(rlhf_jax))
    for name in SIGNATURES:
        assert f"{name}(" in text
        assert "Raises:" in getattr(rlhf_jax, name).__doc__ or name == "generate"


def test_importing_the_package_imports_no_library_that_takes_time():
    code = "import sys, rlhf_jax; print({'jax', 'flax', 'transformers', 'pandas'} & {*sys.modules})"
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert found.stdout.strip() == "set()"
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        _ = rlhf_jax.trian


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_runs_in_an_empty_directory_and_writes_nowhere_else(
    example, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(example))["main"]()
    assert len(capsys.readouterr().out.splitlines()) > 1
    assert {path.name for path in tmp_path.iterdir()} <= {"results", "tuned-model"}


def test_a_policy_is_not_trained_twice_and_another_reward_is_another_run(model, tmp_path):
    cfg = PPOConfig(prompts=2, batch=2, forward_batch=2, passes=1, inner_epochs=1,
                    response_tokens=4)  # fmt: skip
    calls = []

    def short(prompts, responses):
        calls.append(prompts)
        return [-len(response) for response in responses]

    def long(prompts, responses):
        return [len(response) for response in responses]

    messages = [{"role": "user", "content": "b"}]
    first, again, other = (
        rlhf_jax.train_policy(model, ["a", messages], reward=reward, config=cfg, out=tmp_path)
        for reward in (short, short, long)
    )
    assert len(calls) == 1 and sorted(calls[0]) == ["a", "b"]
    assert first.run.path == again.run.path != other.run.path
    assert rlhf_jax.generate(again, ["a"], response_tokens=4) == rlhf_jax.generate(
        first, ["a"], response_tokens=4
    )


def test_messages_of_several_turns_are_one_prompt_as_in_preference_data():
    dialogue = [
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "two"},
        {"role": "user", "content": "three"},
    ]
    assert api.prompt_texts([dialogue, " kept as it is "]) == [
        "Human: one\n\nAssistant: two\n\nHuman: three", " kept as it is "
    ]  # fmt: skip


@pytest.mark.parametrize("prompt", ["", " ", [], [{"role": "assistant", "content": "a"}], 3])
def test_a_prompt_that_asks_nothing_is_told_with_its_number(prompt):
    with pytest.raises(UserError, match="prompt 2 "):
        api.prompt_texts(["a", prompt])


def test_too_few_prompts_and_two_models_of_one_name_are_told(model):
    with pytest.raises(UserError, match="prompts=2000, but 1 are given; set prompts=1"):
        rlhf_jax.train_policy(model, ["a"], reward=lambda p, r: [0.0], config=PPOConfig())
    with pytest.raises(UserError, match="same name"):
        rlhf_jax.evaluate([model, model], ["a"], rewards={"r": lambda p, r: [0.0] * len(r)})

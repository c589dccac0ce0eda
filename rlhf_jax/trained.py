"""Models that runs have trained: as objects, and found again from the runs' own records.

Nothing is asked of the environment and nothing is trained: the record says from which model, with
which configuration and from which other runs a run was made. Those lie beside it, or where the
record says.
"""

import dataclasses
import tempfile
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from flax import nnx

from experiment_runs import hosts
from experiment_runs.checkpoints import written
from experiment_runs.devices import on_host
from experiment_runs.errors import UserError, brief
from experiment_runs.files import fingerprint
from experiment_runs.run import Run
from rlhf_jax.config import SMOLLM2, PPOConfig, ppo_config
from rlhf_jax.data.dialogues import conversations
from rlhf_jax.evaluation.policies import BASE, RATED, SplitDecoder
from rlhf_jax.export.huggingface import (
    export_policy,
    generation_settings,
    is_free,
    merged_adapters,
)
from rlhf_jax.language_model.sampling import Responses
from rlhf_jax.ppo import training as ppo_training
from rlhf_jax.ppo.reward_identity import function_fingerprint
from rlhf_jax.ppo.rewards import RewardFunction, on_all_processes
from rlhf_jax.pretrained import hub, loading
from rlhf_jax.pretrained.model import Pretrained, model_fingerprint, tokenizer_fingerprint
from rlhf_jax.pretrained.prompt_rows import prompt_rows
from rlhf_jax.pretrained.responses import response_rows
from rlhf_jax.reward_model import model as reward_models
from rlhf_jax.reward_model.encoding import MINIMUM_PROMPT
from rlhf_jax.reward_model.model import FrozenRewardModel, response_rewards

Prompt = str | Sequence[Mapping[str, str]]  # a text, or chat messages that end with the user's


@dataclasses.dataclass(frozen=True)
class TunedModel(Pretrained):
    """A model that was tuned, to be used like any other, and the run that did it."""

    run: Run
    settings: PPOConfig

    def save(self, folder: str | Path) -> None:
        """Writes the model in the layout of Hugging Face, for `load` and for transformers.

        Raises:
          UserError: something else is there already, or the folder cannot be written.
        """
        state = on_host(self.state) if hosts.several() else self.state  # which all must ask for
        if hosts.first():
            self._save(state, Path(folder).expanduser().absolute())
        hosts.meet(f"model in {folder}")

    def _save(self, state: nnx.State, folder: Path) -> None:
        decoder = nnx.merge(self.definition, state)
        with written(folder):
            folder.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=folder.parent) as place:
                made = Path(place, "model")
                export_policy(decoder, self, made, generation_settings(self.settings))
                if is_free(folder):
                    made.replace(folder)
                elif content(folder) != content(made):
                    raise UserError(f"{folder}: is there already; name another folder or remove it")


@dataclasses.dataclass(frozen=True)
class TrainedRewardModel:
    """A frozen reward model and the run that trained it."""

    frozen: FrozenRewardModel
    pretrained: Pretrained
    run: Run
    max_tokens: int  # of prompt and response together

    @on_all_processes
    def score(
        self, prompts: Iterable[Prompt], responses: Iterable[str], *, batch: int = 16
    ) -> list[float]:
        """Rewards of responses, in deviations from the mean of the untrained model's responses.

        It is a reward function itself: for a policy with another tokenizer give `rm.score`.

        Args:
          prompts: one a response, texts or chat messages; the end of one that does not fit beside
            its response into `max_tokens` is cut, as in training.
          responses: texts. The end of one that does not fit by itself is cut, with a warning.
          batch: how many are read at a time.

        Raises:
          UserError: there are not as many prompts as responses, one of them is none, or `batch` is
            not at least 1.
        """
        if batch < 1:
            raise UserError(f"score: batch={batch} must be at least 1")
        asked, answers = conversations(prompts), texts(responses)
        if len(asked) != len(answers):
            raise UserError(f"score: {len(asked)} prompts but {len(answers)} responses")
        if not answers:
            return []
        tokenizer = self.pretrained.tokenizer
        room = max(self.max_tokens - tokenizer.template_length - MINIMUM_PROMPT, 1)
        replies, cut = response_rows(answers, tokenizer, length=room)
        if cut:
            warnings.warn(f"score: {cut} responses are cut to {room} tokens", stacklevel=2)
        left = (self.max_tokens - replies.mask.sum(axis=1)).tolist()
        rows, masks, _ = prompt_rows(asked, tokenizer, length=left)
        rewards = []
        for start in range(0, len(rows), batch):
            part = slice(start, start + batch)
            found = response_rewards(
                self.frozen.state, rows[part], masks[part], Responses(*(x[part] for x in replies)),
                definition=self.frozen.definition, end=tokenizer.ends,
            )  # fmt: skip
            rewards += on_host(found).tolist()
        return rewards


AnyReward = TrainedRewardModel | RewardFunction
Reward = AnyReward | Mapping[str, tuple[AnyReward, float]]


def texts(responses: Iterable[Any]) -> list[str]:
    """Responses as a list.

    Raises:
      UserError: they are one text, or one of them is none.
    """
    if isinstance(responses, str | Mapping | pd.DataFrame):
        raise UserError(f"responses is {brief(responses)}; give a list, or a column, of texts")
    given = list(responses)
    for number, response in enumerate(given, 1):
        if not isinstance(response, str):
            raise UserError(f"response {number} is {brief(response)}; it must be a text")
    return given


def content(folder: Path) -> dict[Path, str]:
    """Fingerprints of all files below a folder."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder): fingerprint(path) for path in files}


def tuned_model(run: Run, cfg: PPOConfig, model: Pretrained) -> TunedModel:
    """What a finished run made of the model that it started from; adapters are in the weights."""
    decoder = merged_adapters(nnx.merge(*ppo_training.tuned_decoder(run, cfg, model)))
    fields = {field.name: getattr(model, field.name) for field in dataclasses.fields(Pretrained)}
    fields |= {"name": run.path.name, "origin": str(run.path), "state": nnx.state(decoder)}
    return TunedModel(**fields, run=run, settings=cfg)


def reward_for(source: Any, model: Pretrained) -> Any:
    """A reward as the training of a model takes it: a trained one as what is compiled.

    Raises:
      UserError: a reward model reads other tokens than the model writes.
    """
    if not isinstance(source, TrainedRewardModel):
        return source
    if tokenizer_fingerprint(source.pretrained) != tokenizer_fingerprint(model):
        raise UserError(
            f"the reward model {source.run.path.name} has another tokenizer than {model.name}; "
            "give its method `score` as the reward, which reads texts"
        )
    return source.frozen


def reward_fingerprint(source: Any, name: str = "") -> str:
    """Tells a trained reward model or a function from others; a name stands for a function."""
    if isinstance(source, TrainedRewardModel):
        return source.run.identity
    return fingerprint(name) if name else function_fingerprint(source)


def starting_model(run: Run, *, model: str = "") -> Pretrained:
    """The model that a run started from.

    Args:
      run: of any stage of language models.
      model: folder or hub id, where the model is no longer to be had as it was named then.

    Raises:
      UserError: the record names no model, or what is found is another one.
    """
    recorded, wanted = run.about.get("model"), run.record["inputs"].get("model")
    texts = isinstance(recorded, dict) and all(isinstance(x, str) for x in recorded.values())
    if recorded and not (texts and ("run" in recorded or {"name", "file", "dtype"} <= {*recorded})):
        raise UserError(f"{run.path}/config.json: about.model is {brief(recorded)}; restore it")
    if not recorded or wanted is None:
        raise UserError(f"{run.path}: a run of stage {run.stage!r}, which has no language model")
    if "run" in recorded and not model:
        before = beside(run, recorded["run"])
        return tuned_model(before, ppo_config(before.config), starting_model(before))
    name, dtype = model or recorded["name"], recorded["dtype"]
    places = [hub.find(name)]
    if name == SMOLLM2 and (packaged := hub.packaged_gguf()):
        places.append(packaged)
    for place in places:
        if hub.identity(place, dtype=dtype) == wanted:
            return loading.load(place, name=recorded["name"], dtype=dtype)
    for place in places:  # a program of one's own knows a model by its weights, not by its files
        found = loading.load(place, name=recorded["name"], dtype=dtype)
        if model_fingerprint(found) == wanted:
            return found
    raise UserError(
        f"{run.path}: started from {recorded['name']} ({recorded['file']}, {dtype}), and {name} is "
        "another one now; say with --model where the right one is"
    )


def upstream(run: Run, stage: str) -> Run:
    """The run of a stage that a run was made from.

    Raises:
      UserError: it was made from none, or that one is not beside it.
    """
    identity = run.record["inputs"].get(stage)
    if identity is None:
        raise UserError(f"{run.path}: a run of stage {run.stage!r}, made from no run of {stage!r}")
    return beside(run, f"{stage}-{identity[:10]}")


def beside(run: Run, path: str) -> Run:
    """Another run, by its path from the folder that holds a run."""
    other = run.path.parent / path
    if not (other / "config.json").exists():
        raise UserError(f"{run.path}: was made from {path}, which is not beside it")
    return Run(other)


def policy_runs(run: Run) -> dict[str, Run]:
    """The finished runs of the policies that a run trained, or that an evaluation compares by hand.

    Raises:
      UserError: it has none.
    """
    if run.stage.startswith("ppo"):
        found = {run.stage: run}
    else:
        stages = [stage for stage in RATED if stage in run.record["inputs"]]
        found = {stage: upstream(run, stage) for stage in stages}
    if not found:
        raise UserError(
            f"{run.path}: a run of stage {run.stage!r}, which has no policy; name a run of ppo-... "
            "or evaluate"
        )
    for one in found.values():
        one.require_finished()
    return found


def policies(runs: Mapping[str, Run], pretrained: Pretrained) -> dict[str, SplitDecoder]:
    """The decoders of the model that they started from and of tuned policies, by name."""
    tuned = {
        name: ppo_training.tuned_decoder(run, ppo_config(run.config), pretrained)
        for name, run in runs.items()
    }
    return {BASE: (pretrained.definition, pretrained.state), **tuned}


def lengths(runs: Mapping[str, Run]) -> PPOConfig:
    """The configuration that says how long prompts and responses were in training."""
    return ppo_config(next(iter(runs.values())).config)


def reward_model(run: Run, pretrained: Pretrained) -> FrozenRewardModel | None:
    """The reward model that a run was made with, the first of several; None for functions alone.

    Args:
      run: of a policy, or an evaluation.
      pretrained: what the run started from.
    """
    paths = run.about.get("reward_models")  # where a program of one's own made the run
    if paths == []:
        return None
    made = beside(run, paths[0]) if paths else upstream(run, "reward")
    same = made.record["inputs"]["model"] == run.record["inputs"]["model"]
    return reward_models.load(made, pretrained if same else starting_model(made))

"""Models that finished runs have trained, found again from the runs' own records.

Nothing is asked of the environment and nothing is trained: the record says from which model, with
which configuration and from which other runs a run was made. Those lie beside it.
"""

from collections.abc import Mapping
from pathlib import Path

from experiment_runs.errors import UserError
from experiment_runs.run import Run
from rlhf_jax.config import SMOLLM2, PPOConfig, ppo_config
from rlhf_jax.evaluation.policies import BASE, RATED, SplitDecoder
from rlhf_jax.ppo import training as ppo_training
from rlhf_jax.pretrained import hub, loading
from rlhf_jax.pretrained.model import Pretrained
from rlhf_jax.reward_model import model as reward_models
from rlhf_jax.reward_model.model import FrozenRewardModel


def starting_model(run: Run, *, model: str = "") -> Pretrained:
    """The model that a run started from.

    Args:
      run: of any stage of language models.
      model: folder or hub id, where the model is no longer to be had as it was named then.

    Raises:
      UserError: the record names no model, or what is found is another one.
    """
    recorded = run.record.get("about", {}).get("model")
    if not recorded or "model" not in run.record["inputs"]:
        raise UserError(f"{run.path}: a run of stage {run.stage!r}, which has no language model")
    name, dtype = model or recorded["name"], recorded["dtype"]
    places = [hub.find(name)]
    if name == SMOLLM2 and (packaged := hub.packaged_gguf()):
        places.append(packaged)
    for place in places:
        if hub.identity(place, dtype=dtype) == run.record["inputs"]["model"]:
            return loading.load(place, name=recorded["name"], dtype=dtype)
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
    path = run.path.parent / f"{stage}-{identity[:10]}"
    if not (path / "config.json").exists():
        raise UserError(f"{run.path}: was made from {path.name}, which is not beside it")
    return Run(path)


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


def reward_model(run: Run, pretrained: Pretrained) -> FrozenRewardModel:
    """The reward model that a run was made with."""
    return reward_models.load(upstream(run, "reward"), pretrained)


def run_of(path: Path, stage: str) -> Run:
    """The finished run in a directory, which must be of a stage.

    Raises:
      UserError: it is not.
    """
    run = Run(path)
    if run.stage != stage:
        raise UserError(f"{path}: a run of stage {run.stage!r}; name one of {stage!r}")
    run.require_finished()
    return run

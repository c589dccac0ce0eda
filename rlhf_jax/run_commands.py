"""The commands that use what has been trained: each is given the directory of a run.

Model and configuration come from the run's record; no profile is asked for and nothing is trained.
"""

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

import tyro

from experiment_runs import inventory, settings
from experiment_runs.compilation import keep_programs
from experiment_runs.configuration import MOST_OF, check_not_negative, check_seed
from experiment_runs.errors import UserError
from experiment_runs.files import append_jsonl, fingerprint, read_whole, utf8
from experiment_runs.lock import locked
from experiment_runs.precision import resolved
from experiment_runs.run import Run
from rlhf_jax import trained
from rlhf_jax.chat import chat
from rlhf_jax.export.foreign_reward_model import load_reward_model
from rlhf_jax.export.huggingface import export_run
from rlhf_jax.pretrained import hub
from rlhf_jax.pretrained.model import Pretrained
from rlhf_jax.pretrained.responses import answers
from rlhf_jax.ratings.plain_text import block
from rlhf_jax.ratings.questionnaire import rate_in_browser, rate_in_terminal
from rlhf_jax.ratings.store import RATINGS

BATCH = 32  # prompts that are answered at a time


@dataclasses.dataclass(frozen=True, kw_only=True)
class UseModel:
    """A command that needs the models of a run."""

    run: tyro.conf.Positional[Path]  # the run's directory, as training printed it
    model: str = ""  # folder or hub id, where the model it started from is elsewhere now

    def starting_model(self) -> Pretrained:
        """The model that the run started from."""
        return trained.starting_model(Run(self.run), model=self.model)


@dataclasses.dataclass(frozen=True, kw_only=True)
class AskModel(UseModel):
    """A command in which the models of a run answer prompts."""

    precision: Literal["", "auto", "float32", "mixed", "bfloat16"] = ""  # as in training by default

    def starting_model(self) -> Pretrained:
        """The model that the run started from, in the precision that is asked for."""
        keep_programs()
        base = super().starting_model()
        dtype = resolved(self.precision) if self.precision else base.config.dtype
        return dataclasses.replace(base, config=dataclasses.replace(base.config, dtype=dtype))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Generate(AskModel):
    """Answers of a tuned policy, and of the model that it started from, to your prompts.

    For instance:

      python -m rlhf_jax generate results/local/ppo-lora-0123456789 --prompt "Why is the sky blue?"
      python -m rlhf_jax generate RUN_DIR --file prompts.txt --samples 4 --out answers.jsonl
    """

    prompt: tyro.conf.UseAppendAction[tuple[str, ...]] = ()  # may be given several times
    file: Path | None = None  # of prompts, one a line
    samples: int = 1  # answers to each prompt
    temperature: float = 1.0  # 0 takes the most likely token
    tokens: int | None = None  # longest answer; as in training by default
    seed: int = 0
    out: Path | None = None  # a new file of JSON lines; without it the answers are shown

    def execute(self) -> None:
        prompts = self.prompts()
        if self.out is not None and self.out.exists():
            raise UserError(f"--out {self.out}: is there already; name another file or remove it")
        runs = trained.policy_runs(Run(self.run))
        base = self.starting_model()
        cfg = trained.lengths(runs)
        for name, decoder in trained.policies(runs, base).items():
            answered = answers(
                decoder, prompts, base.tokenizer, prompt_tokens=cfg.prompt_tokens,
                length=self.tokens or cfg.response_tokens, temperature=self.temperature,
                seed=self.seed, batch=BATCH,
            )  # fmt: skip
            for prompt, (text, ended) in zip(prompts, answered, strict=True):
                self.give(name, prompt, text, ended)

    def prompts(self) -> list[str]:
        """Every prompt as often as it is to be answered."""
        check_not_negative(self, "temperature")
        check_seed(self)
        if self.samples < 1 or (self.tokens or 1) < 1:
            raise UserError("--samples and --tokens must be at least 1")
        if self.samples > MOST_OF["best_of"] or (self.tokens or 1) > MOST_OF["response_tokens"]:
            raise UserError(
                f"--samples={self.samples}, --tokens={self.tokens}: at most {MOST_OF['best_of']:,} "
                f"samples of {MOST_OF['response_tokens']:,} tokens"
            )
        prompts = [utf8(prompt, "--prompt") for prompt in self.prompt]
        if self.file is not None:
            try:
                lines = read_whole(self.file).decode().splitlines()
                prompts += [line for line in lines if line]
            except (OSError, UnicodeDecodeError) as error:
                raise UserError(f"--file {self.file}: cannot be read ({error})") from None
        if not prompts:
            raise UserError("no prompt; give --prompt 'a question' or --file with one a line")
        return [prompt for prompt in prompts for _ in range(self.samples)]

    def give(self, name: str, prompt: str, response: str, ended: bool) -> None:
        """Writes or shows one answer."""
        if self.out is not None:
            answer = {"model": name, "prompt": prompt, "response": response, "ended": ended}
            append_jsonl(self.out, answer)
        else:
            cut = "" if ended else " (cut off)"
            print(f"\n> {block(prompt).strip()}\n{name}{cut}\n{block(response)}", flush=True)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chat(AskModel):
    """Ask tuned policies and the model that they started from, and see each answer's reward.

    The run is one of ppo-..., or an evaluation, which brings all the policies that it compared.

      python -m rlhf_jax chat results/local/ppo-lora-0123456789
      python -m rlhf_jax chat results/local/evaluate-0123456789 --judge owner/their-reward-model
    """

    judge: str = ""  # folder or hub id of another reward model, for the same tokens

    def execute(self) -> None:
        if self.judge == hub.RANDOM:
            raise UserError("--judge random: no reward model; name the folder or hub id of one")
        run = Run(self.run)
        runs = trained.policy_runs(run)
        base = self.starting_model()
        reward_model = (
            load_reward_model(hub.find(self.judge), base.tokenizer)
            if self.judge
            else trained.reward_model(run, base)
        )
        cfg = trained.lengths(runs)
        chat(
            trained.policies(runs, base), reward_model, base.tokenizer,
            prompt_tokens=cfg.prompt_tokens, response_tokens=cfg.response_tokens,
        )  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rate:
    """Rate the responses of an evaluation yourself: blind, one at a time, in random order.

    Stop whenever you like; the next call goes on there.

      python -m rlhf_jax rate results/local/evaluate-0123456789 --rater "your name"
      python -m rlhf_jax rate results/local/evaluate-0123456789 --rater "your name" --browser
    """

    run: tyro.conf.Positional[Path]  # directory of a run of stage evaluate
    rater: str = ""  # your name
    browser: bool = False  # a page on this machine instead of the terminal
    kind: Literal["person", "ai"] = "person"  # who rates

    def execute(self) -> None:
        run = inventory.run_of(self.run, "evaluate")
        samples = run.samples(prompt=str, response=str, model=str, rated=bool)
        responses = [row for row in samples if row["rated"]]
        rate = rate_in_browser if self.browser else rate_in_terminal
        own = f"lock-{fingerprint(self.rater)}"  # a rater rates in one place at a time
        with locked(run.path / own, wait=False):
            rate(responses, run.path / RATINGS, self.rater, kind=self.kind)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Export(UseModel):
    """Write a trained model in the Hugging Face layouts: policy, reward model or PEFT adapter.

    For instance:

      python -m rlhf_jax export results/local/ppo-lora-0123456789 --out exported
    """

    out: Path = Path("exported")  # a new directory
    merged: bool = False  # adapters added to the weights, so that PEFT is not needed

    def execute(self) -> None:
        run = Run(self.run)
        base = self.starting_model()
        export_run(run, base, self.out, merged=self.merged)
        print(f"wrote {self.out}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class List:
    """What is there, the disk that it takes, and whether the present code made it."""

    folders: tyro.conf.Positional[tuple[Path, ...]] = ()  # of runs; results/local by default

    def execute(self) -> None:
        for folder in self.folders or (settings.results(),):
            print(inventory.listing(folder))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Show:
    """How a run was made, what it found, and the disk that it takes."""

    run: tyro.conf.Positional[Path]

    def execute(self) -> None:
        print(inventory.description(Run(self.run)))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compare:
    """Two runs side by side: what differs in how they were made, and their results."""

    one: tyro.conf.Positional[Path]
    other: tyro.conf.Positional[Path]

    def execute(self) -> None:
        print(inventory.comparison(Run(self.one), Run(self.other)))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Remove:
    """Remove runs for good, after asking."""

    runs: tyro.conf.Positional[tuple[Path, ...]]
    yes: bool = False  # do not ask

    def execute(self) -> None:
        inventory.remove(self.runs, yes=self.yes)


@dataclasses.dataclass(frozen=True)
class Runs:
    """List, show, compare or remove runs, of language models and of GANs.

    For instance:

      python -m rlhf_jax runs list
      python -m rlhf_jax runs show results/local/ppo-lora-0123456789
      python -m rlhf_jax runs compare results/local/gan-0123456789 results/assignment/gan-49682805b1
      python -m rlhf_jax runs remove results/local/gan-0123456789 --yes
    """

    action: Annotated[
        Annotated[List, tyro.conf.subcommand("list", prefix_name=False)]
        | Annotated[Show, tyro.conf.subcommand("show", prefix_name=False)]
        | Annotated[Compare, tyro.conf.subcommand("compare", prefix_name=False)]
        | Annotated[Remove, tyro.conf.subcommand("remove", prefix_name=False)],
        tyro.conf.arg(name=""),
    ]

    def execute(self) -> None:
        self.action.execute()


RunCommand = Generate | Chat | Rate | Export | Runs
COMMANDS = {
    "generate": Generate, "chat": Chat, "rate": Rate, "export": Export, "runs": Runs,
}  # fmt: skip

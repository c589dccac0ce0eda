"""The chapter on ratings: responses that are there to be rated, with their ratings."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from IPython.display import Markdown

from experiment_runs.run import Run, find
from experiment_runs.settings import PROJECT
from rlhf_jax.ratings.rater_agreement import rater_agreement, reading
from rlhf_jax.ratings.store import RATINGS, Rating, load_ratings, rating_state, rating_table
from rlhf_report.style import POLICY_NAMES
from rlhf_report.tables import escape, quote, table

REFERENCE = PROJECT / "results" / "reference"  # committed runs


def reference_evaluation(shown: Run, folder: Path = REFERENCE) -> Run | None:
    """The committed evaluation whose responses stand beside another run's own.

    None where no evaluation was committed, or where the run that is shown is that one.
    """
    if not any(folder.glob("evaluate*/summary.json")):
        return None
    reference = find("evaluate", folder)
    return None if reference.path == shown.path else reference


def rated_responses(run: Run) -> list[dict[str, Any]]:
    """The responses of an evaluation that are there to be rated."""
    return [row | {"model": POLICY_NAMES[row["model"]]} for row in run.samples() if row["rated"]]


def prompt_and_responses(responses: Sequence[Mapping[str, Any]], prompt_id: int) -> str:
    """One prompt and what each policy answered."""
    own = [row for row in responses if row["prompt_id"] == prompt_id]
    blocks = [f"**Prompt {prompt_id + 1}.** {escape(own[0]['prompt'])}"]
    for row in own:
        blocks += [f"*{row['model']}* (reward {row['reward']:.2f})", quote(row["response"])]
    return "\n\n".join(blocks)


def reference_section(run: Run | None) -> list[str]:
    """The reference run's rated responses, the ratings behind each prompt, and what they say."""
    if run is None:
        return []
    responses = rated_responses(run)
    given = load_ratings(run.path / RATINGS, responses)
    profile, started = run.about["profile"]["name"], run.record["started"]
    blocks = [
        f"**The responses of the committed reference run** (profile *{profile}*, made on "
        f"{escape(started)}). {escape(rating_state(responses, given))}"
    ]
    for prompt_id in dict.fromkeys(row["prompt_id"] for row in responses):
        blocks.append(prompt_and_responses(responses, prompt_id))
        blocks.append(table(rating_table(responses, given, prompt_id), digits=1).data)
    blocks += ["All prompts together:", table(rating_table(responses, given), digits=2).data]
    return [*blocks, escape(reading(responses, given)), agreement_table(given).data]


def agreement_table(given: Sequence[Rating]) -> Markdown:
    """How far every two raters agree, as a table; a sentence where there is one at most."""
    found = rater_agreement(given)
    if found.empty:
        return Markdown("With fewer than two raters there is no agreement to measure.")
    return table(found, digits=2)

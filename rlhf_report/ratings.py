"""The chapter on ratings: responses that are there to be rated, with their ratings."""

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from IPython.display import Markdown
from jaxtyping import Float

from experiment_runs import settings
from experiment_runs.inventory import find
from experiment_runs.run import Run
from experiment_runs.settings import RESULTS
from rlhf_jax.config import RATED_PROMPTS
from rlhf_jax.intervals import bootstrap
from rlhf_jax.ratings.plain_text import read_until
from rlhf_jax.ratings.rater_agreement import CHANCE, by_model, coin, mean_scores, rater_agreement
from rlhf_jax.ratings.store import (
    CRITERIA,
    RATINGS,
    Rating,
    Response,
    label,
    load_ratings,
    mean,
    rating_state,
    rating_table,
    response_hash,
)
from rlhf_report.style import POLICY_NAMES, listed
from rlhf_report.tables import escape, quote, table

SOFT_HYPHEN = "\u00ad"
# Where words of the criteria may part at the head of a narrow column, so that responses have room.
PARTED = {
    word.replace("|", ""): word.replace("|", SOFT_HYPHEN) for word in (
        "coher|ence", "rele|vance", "help|ful|ness", "com|plete|ness", "hallu|ci|na|tion",
        "toxi|city",
    )
}  # fmt: skip
REFERENCE = RESULTS / "reference"  # committed runs
# What it means that reward and rating moved by these signs, from the baseline to a tuned policy.
MOVED = {
    (1, -1): "Reward up and rating down, as in over-optimisation: the reward model is pleased, the "
    "reader is not.",
    (1, 1): "Both rose: the reward model asked for what the raters want.",
    (-1, -1): "Both fell: the training made these responses worse by either measure.",
    (-1, 1): "Rating up without reward: the raters like what the reward model does not.",
    (1, 0): "The rise in reward shows in no rating.",
    (-1, 0): "The fall in reward shows in no rating.",
    (0, 1): "The rating rose at the same reward.",
    (0, -1): "The rating fell at the same reward.",
    (0, 0): "Neither moved measurably.",
}


def reference_evaluation(shown: Run, folder: Path = REFERENCE) -> Run | None:
    """The committed evaluation whose responses stand beside another run's own.

    None where no evaluation was committed, where the run that is shown is that one, and in a
    submission, which shows its own run alone.
    """
    if settings.submission() or not any(folder.glob("evaluate*/summary.json")):
        return None
    reference = find("evaluate", folder)
    return None if reference.path == shown.path else reference


def rated_responses(run: Run) -> list[dict[str, Any]]:
    """The responses of an evaluation that are there to be rated."""
    return [row | {"model": POLICY_NAMES[row["model"]]} for row in run.samples() if row["rated"]]


def given_ratings(run: Run) -> list[Rating]:
    """The ratings that the report shows: in a submission, those by people alone."""
    if settings.submission():
        return people_ratings(run)
    return load_ratings(run.path / RATINGS, rated_responses(run))


def people_ratings(run: Run) -> list[Rating]:
    """The ratings that people gave."""
    every = load_ratings(run.path / RATINGS, rated_responses(run))
    return [rating for rating in every if rating.rater_kind == "person"]


def in_tables(responses: Sequence[Response]) -> list[Response]:
    """Those to as many prompts as the assignment asks for; more would fill pages."""
    first = list(dict.fromkeys(row["prompt_id"] for row in responses))[:RATED_PROMPTS]
    return [row for row in responses if row["prompt_id"] in first]


def claim_reading(responses: Sequence[Response], given: Sequence[Rating]) -> str:
    """What the chapter can claim with so many of its responses rated."""
    done = sum(bool(given_to(row, given)) for row in responses)
    if not done:
        return "None until somebody has rated."
    share = "Every response" if done == len(responses) else f"{done} of {len(responses)} responses"
    return f"{share} below {'has' if done == len(responses) else 'have'} been rated."


def scope_reading(responses: Sequence[Response]) -> str:
    """Which of the prompts the tables show."""
    every, shown = (
        len({row["prompt_id"] for row in own}) for own in (responses, in_tables(responses))
    )
    if shown == every:
        return "The tables show all of them."
    return (
        f"The tables show the first {shown}; every mean and comparison counts all {every}, whose "
        "texts are in samples.jsonl, beside the ratings."
    )


def prompts_block(responses: Sequence[Response]) -> Markdown:
    """The prompts whose responses are rated, whole."""
    prompts = {row["prompt_id"]: row["prompt"] for row in responses}
    read = {row["prompt_id"]: read_until(row.get("read", "")) for row in responses}
    return Markdown(
        "\n\n".join(
            f"**Prompt {k + 1}.** {escape(text)} {escape(read[k])}" for k, text in prompts.items()
        )
    )


def model_table(responses: Sequence[Response], given: Sequence[Rating], model: str) -> pd.DataFrame:
    """The form of the assignment: what one model answered to each prompt, and its mean ratings."""
    rows = []
    for row in responses:
        if row["model"] != model:
            continue
        own = given_to(row, given)
        scores = {head(c): mean(getattr(rating, c) for rating in own) for c in CRITERIA}
        rows.append(
            {"prompt": str(row["prompt_id"] + 1), "generated response": row["response"]} | scores
        )
    return pd.DataFrame(rows)


def head(criterion: str) -> str:
    """A criterion at the head of a column, which may be narrow."""
    return " ".join(PARTED.get(word, word) for word in label(criterion).split())


def given_to(response: Response, given: Sequence[Rating]) -> list[Rating]:
    """The ratings of one response."""
    key = response_hash(response["prompt"], response["response"])
    return [rating for rating in given if rating.response_hash == key]


def criteria_table(responses: Sequence[Response], given: Sequence[Rating]) -> pd.DataFrame:
    """Mean ratings by criterion, a column for each model, and who is rated highest and lowest."""
    means = rating_table(responses, given).set_index("model")
    rows = []
    for criterion in [*map(label, CRITERIA), "mean"]:
        own = means[criterion]
        rows.append({"criterion": criterion, **own, "highest": best(own), "lowest": best(-own)})
    return pd.DataFrame(rows)


def best(means: pd.Series) -> str:
    """The models with the highest mean; a dash where all have the same, or none is rated."""
    means = means.dropna().round(6)  # sums in another order are the same mean
    if means.nunique() < 2:
        return "–"
    return listed(means.index[means == means.max()])


def over_optimisation_reading(responses: Sequence[Response], given: Sequence[Rating]) -> str:
    """For each tuned model, whether reward and rating moved together; the first is the baseline.

    With so few prompts that all on one side would be no surprise, these responses are described
    and no model is ranked; with more, what moved by less than its interval did not move.
    """
    scored = mean_scores(responses, given)
    others = by_model((row, (row["reward"], score)) for row, score in scored)
    base = responses[0]["model"]
    own, texts = others.pop(base, {}), []
    for name, theirs in others.items():
        if both := sorted(own.keys() & theirs.keys()):
            pairs = np.array([[own[prompt], theirs[prompt]] for prompt in both])
            told = [movement(*pairs[:, :, column].T) for column in (0, 1)]
            (reward, up), (rating, liked) = told
            means = MOVED[up, liked] if coin(len(both)) <= CHANCE else too_few(len(both))
            texts.append(f"{name}: mean reward {reward}, mean rating {rating}. {means}")
    if not texts:
        return f"Until responses of {base} and of a tuned policy are rated, nothing can be said."
    return "\n".join(f"* {text}" for text in texts)


def too_few(prompts: int) -> str:
    """Why nothing is concluded from responses to so many prompts."""
    who = "1 prompt ranks" if prompts == 1 else f"{prompts} prompts rank"
    return (
        f"{who} no model: all on one side would happen to a fair coin in {coin(prompts):.0%} of "
        "cases."
    )


def movement(
    before: Float[np.ndarray, "prompts"], after: Float[np.ndarray, "prompts"]
) -> tuple[str, int]:
    """Two means and their difference in words, and its sign."""
    change = after - before
    sign, interval = np.sign(round(float(change.mean()), 6)), ""
    if coin(len(change)) <= CHANCE:
        found = bootstrap(change)
        interval = f" [{found.low:+.2f}, {found.high:+.2f}]"
        sign = 0 if found.low <= 0 <= found.high else sign
    told = f"{before.mean():.2f} to {after.mean():.2f} ({change.mean():+.2f}{interval})"
    return told, int(sign)


def telling_example(responses: Sequence[Response], given: Sequence[Rating]) -> str:
    """The two responses to one prompt on which reward model and raters are most at odds; where
    they never are, those that the raters set farthest apart."""
    pairs = [
        (*sorted(pair, key=lambda x: x[0]["reward"]),)
        for pair in itertools.combinations(mean_scores(responses, given), 2)
        if pair[0][0]["prompt_id"] == pair[1][0]["prompt_id"]
    ]
    pairs = [(low, high) for low, high in pairs if low[1] != high[1]]
    if not pairs:
        return "No two responses to one prompt differ in their ratings: there is no example."

    def odds(pair):
        (less, low), (more, high) = pair
        return low > high, abs(low - high), more["reward"] - less["reward"]

    (less, low), (more, high) = max(pairs, key=odds)
    prefer = f"the response of {more['model']}, at {more['reward']:.2f} to {less['reward']:.2f}"
    name = less["model"] if low > high else more["model"]
    raters = f"{max(low, high):.1f} to {min(low, high):.1f}"
    verdict = "that of " + name if low > high else "the same one"
    head = (
        f"The example that shows it best: on prompt {less['prompt_id'] + 1} the reward model "
        f"prefers {prefer}; the raters prefer {verdict}, at {raters}."
    )
    blocks = [head]
    for row in (more, less):
        blocks.append(quote(row["response"], head=f"*{row['model']}*:"))
    return "\n\n".join(blocks)


def reference_section(run: Run | None) -> list[str]:
    """The reference run's rated responses in the same tables, and what their ratings say."""
    if run is None:
        return []
    responses = rated_responses(run)
    given = load_ratings(run.path / RATINGS, responses)
    profile, started = run.about["profile"]["name"], run.record["started"]
    shown = in_tables(responses)
    blocks = [
        f"**The responses of the committed reference run** (profile *{profile}*, made on "
        f"{escape(started)}). {escape(rating_state(responses, given))} "
        f"{escape(scope_reading(responses))}",
        prompts_block(shown).data,
    ]
    for model in dict.fromkeys(row["model"] for row in responses):
        rows = table(model_table(shown, given, model), digits=1).data
        blocks.append(f"{rows}\n\n: {escape(model)}")  # a caption, which stays with its table
    means = table(criteria_table(responses, given), digits=2).data
    blocks.append(f"{means}\n\n: All prompts together.")
    return [*blocks, over_optimisation_reading(responses, given), agreement_table(given).data]


def agreement_table(given: Sequence[Rating]) -> Markdown:
    """How far every two raters agree, as a table; a sentence where there is one at most."""
    found = rater_agreement(given)
    none = "With fewer than two raters there is no agreement to measure."
    return table(found, digits=2, empty=none)

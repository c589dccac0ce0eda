"""The chapter on data: what was read, from where, and what goes into the reward model."""

import pandas as pd
from IPython.display import Markdown

from experiment_runs.run import Run
from rlhf_report.tables import escape


def sources_table(run: Run, gan: Run) -> pd.DataFrame:
    """Model, texts and images: what was read, and from where."""
    model = run.about["model"]
    rows = {"model": f"{model['name']} ({model['file']}, {model['dtype']})"}
    for what in ("preferences", "prompts"):
        own = run.about[what]
        about = filter(None, [f"{own['rows']:,} rows", own["note"]])
        rows[what] = f"{own['name']} ({own['kind']}): {'; '.join(about)}"
    rows["images"] = gan.summary["source"]
    return pd.DataFrame(rows.items(), columns=["what", "which"])


def licences_table(run: Run) -> pd.DataFrame:
    """Under what terms the texts may be used."""
    rows = {what: run.about[what]["licence"] for what in ("preferences", "prompts")}
    return pd.DataFrame(rows.items(), columns=["texts", "licence"])


def stand_in_reading(run: Run) -> str:
    """The sentence of the first page that says what is not the protocol's own data."""
    names = [what for what in ("preferences", "prompts") if run.about[what]["kind"] == "stand-in"]
    if not names:
        return "Model and data are those named in the table."
    return (
        f"The {' and '.join(names)} are a stand-in made from the documentation of installed Python "
        "packages, because neither a local copy nor the hub was at hand: real English, but not "
        "human votes and not people's questions."
    )


def losses_reading(run: Run) -> str:
    """What the preferences lost when they were read and divided."""
    source = run.about["preferences"]
    note = source["note"]
    if source["kind"] == "stand-in":
        note = note.partition("; ")[2]  # what stands before are the packages that it was made of
    return f"{note or 'nothing was lost'}."


def preferred_reading(run: Run) -> str:
    """What it means in these data that a reply is preferred."""
    if run.about["preferences"]["kind"] == "stand-in":
        return "here by construction, the documentation of what was asked about and no other."
    return "here as the data label it."


def prompts_reading(run: Run) -> Markdown:
    """What the prompts for PPO are."""
    if run.about["prompts"]["kind"] == "stand-in":
        return Markdown("questions about the installed packages, made by a program")
    own = run.about["prompts"]
    cited = " [@kopf2023openassistant]" if "oasst" in own["name"].lower() else ""
    return Markdown(f"those of {escape(own['name'])}{cited}")


def truncation_table(run: Run) -> pd.DataFrame:
    """How many posts and pairs there are in each part, and what was cut to fit."""
    rows = []
    for part, fit in run.summary["fit"].items():
        rows.append(
            {
                "part": part, "posts": fit["posts"], "pairs": fit["pairs"],
                "prompts cut": fit["prompts_cut"], "tokens cut": fit["tokens_cut"],
                "replies too long": fit["replies_dropped"], "pairs lost": fit["pairs_dropped"],
                "near repeats": fit["near_duplicates"],
            }
        )  # fmt: skip
    return pd.DataFrame(rows)


def inputs_table(run: Run, count: int = 5) -> pd.DataFrame:
    """Pairs exactly as they go into the reward model; where there is no text, posts and lengths of
    held-out ones."""
    if has_texts(run):
        rows = [row for row in run.samples() if "mistake" not in row][:count]
        return pd.DataFrame(rows, columns=["input_chosen", "input_rejected"])
    pairs = run.arrays("test_pairs")
    return pd.DataFrame(
        {
            "post": pairs["post"][:count],
            "chosen reply (tokens)": pairs["chosen_tokens"][:count],
            "rejected reply (tokens)": pairs["rejected_tokens"][:count],
        }
    )


def has_texts(run: Run) -> bool:
    """False for a committed run, in which nobody's posts are published."""
    return any("input_chosen" in row for row in run.samples())


def texts_reading(run: Run) -> str:
    """What to expect where texts are shown."""
    if has_texts(run):
        return "The texts of the posts are quoted as they were written."
    return (
        "This run was committed without the texts of the posts, which belong to their authors; "
        "identifiers and numbers stand in their place."
    )

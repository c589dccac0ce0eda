"""What a notebook that is handed in carries of its runs, for `python -m rlhf_report verify`.

All that a checker needs without training anything: the runs' records, the rewards of every response
as numbers, the rated responses and their ratings. A fingerprint of it stands in the metadata of
every file, so that an accident, or an edit of one file alone, shows. It is no protection against
somebody who computes the fingerprints anew.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from experiment_runs.files import fingerprint, to_plain
from experiment_runs.run import Run
from rlhf_report.ratings import people_ratings, rated_responses

PLACE = "submission"  # in the notebook's metadata
RECORD = ("stage", "identity", "config", "inputs", "format", "numerics")
SOURCE = ("kind", "name", "fingerprint")  # of data
RESPONSE = ("prompt_id", "prompt", "response", "model", "reward", "read")


def carried(student_id: str, profile: str, runs: Mapping[str, Run]) -> dict[str, Any]:
    """The records, data, numbers, responses and ratings of the runs that a report shows.

    Args:
      student_id: whose they are.
      profile: its name.
      runs: by stage; "reward", "evaluate" and "gan" among them.
    """
    evaluation = runs["evaluate"]
    ppo = {stage: run for stage, run in runs.items() if stage.startswith("ppo-")}
    responses = [
        {name: row[name] for name in RESPONSE if name in row} for row in rated_responses(evaluation)
    ]
    return to_plain(
        {
            "student_id": student_id,
            "profile": profile,
            "runs": {stage: record(run) for stage, run in runs.items()},
            "data": {
                name: {field: evaluation.about[name][field] for field in SOURCE}
                for name in ("preferences", "prompts")
            },
            "images": {name: runs["gan"].summary[name] for name in ("dataset", "source")},
            "counts": {  # of what a configuration says how much it may be at most
                "reward": {"train_pairs": runs["reward"].summary["pairs"]["train"]},
                "evaluate": {"prompts": evaluation.summary["prompts"]},
                **{stage: {"prompts": run.summary["prompts"]} for stage, run in ppo.items()},
            },
            "final_kl": {stage: run.metrics()["kl"].iloc[-1] for stage, run in ppo.items()},
            "arrays": {
                name: values
                for name, values in evaluation.arrays().items()
                if not name.startswith("best_of.")
            },
            "responses": responses,
            "ratings": [dataclasses.asdict(rating) for rating in people_ratings(evaluation)],
        }
    )


def record(run: Run) -> dict[str, Any]:
    """What a run's identity is made of."""
    return {name: run.record[name] for name in RECORD if name in run.record}


def marks(own: Mapping[str, Any]) -> list[str]:
    """The keywords that PDF, notebook and page of one submission have in common."""
    identities = [f"{stage}={run['identity']}" for stage, run in own["runs"].items()]
    return [
        *identities,
        f"profile={own['profile']}",
        f"student={own['student_id']}",
        f"ratings={of_ratings(own['ratings'])}",
        f"content={fingerprint({name: x for name, x in own.items() if name != 'ratings'})}",
    ]


def of_ratings(ratings: Sequence[Mapping[str, Any]]) -> str:
    """Fingerprint of ratings, in whatever order they were given."""
    return fingerprint(sorted(map(fingerprint, ratings)))

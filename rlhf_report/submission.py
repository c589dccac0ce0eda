"""What is handed in: `make submission LAST_NAME=Lovelace STUDENT_ID=123456`.

The report as PDF and as a page, and the executed notebook that it was made from, in a folder that
holds nothing else. The last digit of the student ID chooses the images of the DCGAN. What would
not count is refused: another profile than the protocol's, data that stand in, responses that no
person has rated, somebody else's run. FORCE=1 turns the refusal into a warning.
"""

import argparse
import shutil
import sys
import tempfile
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path

import nbformat

import gan_jax
from experiment_runs import settings
from experiment_runs.assignment import PROTOCOL, SUBMISSION
from experiment_runs.command import concluded
from experiment_runs.errors import UserError
from experiment_runs.files import encode
from experiment_runs.run import Run
from experiment_runs.settings import PROJECT
from gan_jax.data import HISTOLOGY, ImageSet, dataset_for, load
from rlhf_jax.experiment import Experiment, from_environment
from rlhf_jax.ratings.store import by_hash
from rlhf_report.carried import PLACE, carried, marks
from rlhf_report.quarto.publish import settings_cell
from rlhf_report.quarto.render import render
from rlhf_report.ratings import people_ratings, rated_responses
from rlhf_report.source_code import source_cells

EXAMPLE = "make submission LAST_NAME=Lovelace STUDENT_ID=123456"
PUNCTUATION = " .'’-"  # in names of people, and harmless in names of files
LONGEST = 200  # bytes of a name; a file's name holds 255
PROFILE = SUBMISSION["profile"]  # the one that keeps to the protocol
ENDINGS = tuple(SUBMISSION[kind] for kind in ("paper", "notebook", "page"))  # of the files' names
REMEDY = {
    "preferences": (
        "put SHP's files into DATA_DIR/shp, name them with PREFERENCES=folder, or run where the "
        "hub can be reached"
    ),
    "prompts": (
        "put OASST1's file into DATA_DIR/oasst, name it with PROMPTS=folder, or run where the hub "
        "can be reached"
    ),
    "images": "put MedMNIST's file into DATA_DIR/medmnist, or run where it can be fetched",
}


def asked() -> str:
    """The last name that the environment gives, as part of a file's name.

    Raises:
      UserError: it or the student ID is missing, or is not what it should be.
    """
    values = {"LAST_NAME": settings.last_name(), "STUDENT_ID": settings.student_id()}
    if missing := [name for name, value in values.items() if not value]:
        raise UserError(f"{' and '.join(missing)} missing: {EXAMPLE}")
    dataset_for(values["STUDENT_ID"])
    return file_name(values["LAST_NAME"])


def file_name(last_name: str) -> str:
    """A last name as part of a file's name: letters of any script, "_" in place of a space.

    Raises:
      UserError: it holds what no name holds, as a path would, or is too long.
    """
    name = unicodedata.normalize("NFC", " ".join(last_name.split()))
    letters = all(unicodedata.category(x)[0] in "LM" or x in PUNCTUATION for x in name)
    if not (letters and name[:1].isalpha() and len(name.encode()) <= LONGEST):
        raise UserError(
            f"LAST_NAME={last_name!r}: write at most {LONGEST} bytes of letters, spaces, hyphens, "
            "apostrophes and full stops, a letter first"
        )
    return name.replace(" ", "_")


def objections(experiment: Experiment) -> list[str]:
    """What keeps the runs that the environment asks for from counting, before any is trained."""
    found = []
    if experiment.profile.name != PROFILE:
        found.append(
            f"PROFILE={experiment.profile.name}: the protocol is the profile {PROFILE}; "
            f"say PROFILE={PROFILE}"
        )
    if settings.committed():
        return [*found, "RUN: these are committed runs; leave RUN out to hand in runs of your own"]
    for name, source in experiment.sources.items():
        if source.kind == "stand-in":
            found.append(f"{name}: {source.name} stands in for the data; {REMEDY[name]}")
        elif source.kind == "hub" and source.name != (wanted := PROTOCOL["data"][name]):
            found.append(
                f"{name}: {source.name}, the protocol says {wanted}; leave {name.upper()} out"
            )
    images = gan_images()
    if images.name == HISTOLOGY:
        found.append(f"images: {images.source}; {REMEDY['images']}")
    return found


def gan_images() -> ImageSet:
    """The images that the DCGAN is asked to learn."""
    asked_for = gan_jax.experiment.asked()
    cfg = gan_jax.experiment.named(asked_for.pop("profile"))
    return load(cfg.dataset, side=cfg.side, **asked_for)


def unrated(evaluation_run: Run) -> list[str]:
    """An objection where responses are there to be rated and no person has rated them."""
    responses = rated_responses(evaluation_run)
    done = {rating.response_hash for rating in people_ratings(evaluation_run)}
    missing = len(set(by_hash(responses)) - done)
    if not missing:
        return []
    return [
        f"ratings: {missing} of {len(by_hash(responses))} responses are not rated by a person; run "
        f"`.venv/bin/python -m rlhf_jax rate {evaluation_run.path} --rater 'your name' --browser`, "
        "then this again"
    ]


def refuse(found: Sequence[str]) -> None:
    """Raises what was found as one message, or prints it where FORCE says to go on."""
    if not found:
        return
    if settings.forced():
        for objection in found:
            print(f"warning: {objection}", file=sys.stderr)
        return
    listed = "".join(f"\n  {objection}" for objection in found)
    raise UserError(f"this would not count as a submission:{listed}\n  or hand it in with FORCE=1")


def write(name: str, document: Path, runs: Mapping[str, Run]) -> list[Path]:
    """Renders a document of some runs and writes the files to be handed in.

    Args:
      name: of the student, as part of a file's name.
      document: the report.
      runs: those that it shows, by stage; their identities are in every file's metadata.

    Returns:
      The PDF, the notebook and the page: all that their folder holds.
    """
    student = f"{name.replace('_', ' ')}, student ID {settings.student_id()}"
    content = carried(settings.student_id(), settings.profile(), runs)
    with tempfile.TemporaryDirectory() as scratch:
        front_matter = {"author": [student], "keywords": marks(content)}
        formats = ["pdf", "ipynb", "html"]
        written = render(document, formats, Path(scratch), front_matter=front_matter)
        folder = document.parent / "_output" / "submission"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        handed_in = [folder / f"{name}{ending}" for ending in ENDINGS]
        for one, other in zip(written, handed_in, strict=True):
            shutil.move(one, other)
    notebook = nbformat.read(handed_in[1], as_version=4)
    title, asked_for, *rest = notebook.cells
    asked_for.source = settings_cell(settings.asked() | {"RLHF_RESULTS": ""}).source
    notebook.cells = [title, *source_cells(notebook), asked_for, *rest]
    for number, cell in enumerate(notebook.cells):
        cell.id = f"cell-{number}"
    notebook.metadata[PLACE] = encode(content)  # one text: a notebook's own fields are sorted
    nbformat.write(notebook, handed_in[1])
    return handed_in


def shown_runs(experiment: Experiment) -> dict[str, Run]:
    """Every run that the report shows, by stage."""
    runs = {stage: experiment.run(stage) for stage in experiment.stages}
    return runs | {"gan": gan_jax.from_environment()}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m rlhf_report.submission", description=__doc__)
    parser.add_argument(
        "--check", action="store_true", help="only check what can be known before the training"
    )
    options = parser.parse_args(arguments)
    return concluded(lambda: hand_in(check_only=options.check))


def hand_in(*, check_only: bool) -> None:
    """Checks what is asked for, and writes the files where more than that is wanted."""
    name = asked()
    experiment = from_environment()
    refuse(objections(experiment))
    if not check_only:
        settings.hand_in(experiment.profile.name)
        refuse(unrated(experiment.run("evaluate")))
        for path in write(name, PROJECT / "report.qmd", shown_runs(experiment)):
            print(f"wrote {path}")


if __name__ == "__main__":
    sys.exit(main())

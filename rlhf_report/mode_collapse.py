"""The DCGAN's detectors of mode collapse: tables, and readings of what they were seen to detect.

In the table of detectors the first scenario is real against real, the last the trained generator;
between them are planted defects, among which the two collapses are known by their names.
"""

from collections.abc import Mapping, Sequence

import pandas as pd

from experiment_runs.run import Run
from rlhf_report.style import BLUE, GREY, ORANGE, listed, mean_with_interval, panels, short

DETECTOR_NAMES = {
    "birthday": "birthday size",
    "class_divergence": "class KL",
    "class_ms_ssim": "MS-SSIM in class",
    "fid": "FID",
    "kid": "KID",
    "ms_ssim": "MS-SSIM",
    "nn_accuracy": "1-NN accuracy",
    "train_nearest": "training share",
}
COLLAPSED = ("repeated", "collapsed")  # words in the names of the planted collapses
REAL, GENERATED = "real", "generated"
AGAIN = "other"  # a word in the name of the control: real images again
COPIES, NOISE, BLUR = "copies", "noise", "blurred"  # in the names of other planted defects
BY_CLASS = {
    "labels": "real, by label",
    "held_out": "real, by classifier",
    "generated": "generated, by classifier",
}


def detector_figure(rows: pd.DataFrame) -> None:
    """Which detector catches what: a triangle where it does, that points where it has moved."""
    scenarios, detectors = list(rows["scenario"].unique()), list(rows["detector"].unique())
    _, (ax,) = panels(1, height=0.9 + 0.3 * len(scenarios))
    x, y = rows["detector"].map(detectors.index), rows["scenario"].map(scenarios.index)
    caught, above = rows["caught"].astype(bool), higher(rows)
    ax.scatter(x[caught & above], y[caught & above], s=60, marker="^", color=BLUE)
    ax.scatter(x[caught & ~above], y[caught & ~above], s=60, marker="v", color=ORANGE)
    ax.scatter(x[~caught], y[~caught], s=12, color=GREY)
    ax.set(yticks=range(len(scenarios)), yticklabels=scenarios, xticks=range(len(detectors)))
    ax.set_xticklabels(detectors, rotation=40, ha="right")
    ax.invert_yaxis()
    ax.margins(0.06)


def higher(rows: pd.DataFrame) -> pd.Series:
    """Whether a mean lies above that of real against real, the middle of its draws' range."""
    return rows["mean"] > (rows["real_low"] + rows["real_high"]) / 2


def detector_results(run: Run) -> pd.DataFrame:
    """One row a detector and scenario."""
    rows = pd.DataFrame(run.summary["detectors"])
    return rows.assign(detector=rows["detector"].replace(DETECTOR_NAMES))


def detector_table(run: Run) -> pd.DataFrame:
    """Every detector on every scenario; a star marks what is caught."""
    rows = detector_results(run)
    rows["shown"] = [
        f"{short(mean, 2)}{'*' if caught else ''}"
        for mean, caught in zip(rows["mean"], rows["caught"], strict=True)
    ]
    wide = rows.pivot(index="detector", columns="scenario", values="shown")
    return wide.loc[rows["detector"].unique(), rows["scenario"].unique()].reset_index()


def reactions(run: Run) -> dict[str, dict[str, bool]]:
    """The detectors that catch each scenario, with whether they lie above real against real."""
    rows = detector_results(run)
    rows["above"] = higher(rows)
    own = rows[rows["caught"]].groupby("scenario")
    caught = {name: dict(zip(x["detector"], x["above"], strict=True)) for name, x in own}
    return {name: caught.get(name, {}) for name in rows["scenario"].unique()}


def beyond_blur(run: Run) -> dict[str, dict[str, bool]]:
    """The reactions that go further than those to real images that are merely blurred: the
    intervals of the means lie apart. None in a run without blurred ones."""
    rows = detector_results(run)
    blurred = rows[rows["scenario"].str.contains(BLUR)].set_index("detector")
    means = rows.set_index(["scenario", "detector"])

    def further(scenario, name, above):
        own, blur = means.loc[(scenario, name)], blurred.loc[name]
        return own["low"] > blur["high"] if above else own["high"] < blur["low"]

    return {
        scenario: {
            name: above
            for name, above in own.items()
            if len(blurred) and further(scenario, name, above)
        }
        for scenario, own in reactions(run).items()
    }


def collapse_detectors(run: Run) -> list[str]:
    """Detectors that go one way on both planted collapses, further than blur moves them, and that
    way on nothing else planted; none in a run without blurred real images."""
    further = beyond_blur(run)
    collapses = [
        set(own.items()) for name, own in further.items() if any(word in name for word in COLLAPSED)
    ]
    others = [
        set(own.items())
        for name, own in reactions(run).items()
        if name != GENERATED and not any(word in name for word in (*COLLAPSED, BLUR))
    ]
    return sorted(name for name, _ in set.intersection(*collapses).difference(*others))


def rule_reading(run: Run) -> str:
    """How it was decided in this run what is caught."""
    rows = detector_results(run)
    draws = run.config["evidence"]["draws"]
    if "p" not in rows:
        return (
            "This run is older than the rule of today. In it a detector catches a set when the "
            f"mean of {draws} draws lies outside the range of single draws of real against real, "
            "which raises almost no false alarm and overlooks most shifts smaller than that "
            "range; its other draws are of the same real images; and no blurred ones are among "
            "its controls. What it says of collapse is not to be relied on."
        )
    tests = int((rows["scenario"] != REAL).sum())
    return (
        f"A detector catches a set when its differences to real against real, over {draws} draws, "
        f"have a mean other than 0: a t-test with Holm's correction over all {tests}, so that "
        "without any difference one false alarm or more comes up in at most 5 % of such tables. "
        "Real against real and what is compared with it share no image in any draw."
    )


def collapse_table(run: Run) -> pd.DataFrame:
    """The trained generator between real images, sharp and blurred, and the one collapsed on
    purpose, by the detectors of collapse, if any: means, intervals, and the range of real draws."""
    rows = detector_results(run).set_index(["scenario", "detector"])
    found = beyond_blur(run)
    moved = found[GENERATED]
    collapsed, blurred = (
        next((name for name in found if word in name), "") for word in (COLLAPSED[1], BLUR)
    )
    shown = []
    for name in collapse_detectors(run):
        own = rows.loc[(GENERATED, name)]
        shown.append(
            {
                "detector": name,
                "draws of real images": f"{own['real_low']:.3g} to {own['real_high']:.3g}",
                "real, blurred": mean_with_interval(rows.loc[(blurred, name)]),
                "generated": mean_with_interval(own),
                "collapsed on purpose": mean_with_interval(rows.loc[(collapsed, name)]),
                "moves alike": "yes" if moved.get(name) == found[collapsed][name] else "no",
            }
        )
    return pd.DataFrame(shown)


def noise_reading(run: Run) -> str:
    """How strong the planted noise and blur are, measured by the FID."""
    rows = detector_results(run)
    fid = rows[rows["detector"] == DETECTOR_NAMES["fid"]].set_index("scenario")["mean"]
    moved = [(word, name) for word in (NOISE, BLUR) for name in fid.index if word in name]
    words = " and ".join(f"{short(fid[name])} ({word})" for word, name in moved)
    text = (
        f"They move the FID from {short(fid[REAL])} to {words}; the trained generator has "
        f"{short(fid[GENERATED])}."
    )
    strengths = run.summary.get("matched")
    if not strengths:
        return text
    return (
        "Noise and blur are as strong as they must be for real images to lie as far from real "
        "ones as the generated ones do: standard deviations of "
        f"{strengths['noise'] / 2:.1%} of the pixels' range and {strengths['blur']:.1%} of the "
        f"images' side. {text}"
    )


def planted_defects_reading(run: Run) -> str:
    """What the planted defects say of the detectors."""
    caught = reactions(run)
    controls = (AGAIN, BLUR)  # nothing is wrong with these
    planted = [
        name
        for name in caught
        if name not in (REAL, GENERATED) and not any(word in name for word in controls)
    ]
    missed = [name for name in planted if not caught[name]]
    text = f"Of {len(planted)} planted defects {len(planted) - len(missed)} are caught."
    for name in missed:
        text += f' No detector catches "{name}": such a defect would go unnoticed.'
    alarms = next((own for name, own in caught.items() if AGAIN in name), {})
    if alarms:
        text += f" On other real images, {listed(alarms)} would have reacted without cause."
    blurred = next((own for name, own in caught.items() if BLUR in name), {})
    if blurred:
        text += (
            f" Real images that are merely blurred, with no mode lost, move {listed(blurred)}: "
            "what these say of the trained generator may be its lack of detail, where they do not "
            "move further."
        )
    own = collapse_detectors(run)
    if own:
        text += (
            f" Both collapses move {listed(own)}, further than blur does, and nothing else that "
            "was planted moves them that way."
        )
    return text


def collapse_reading(run: Run) -> str:
    """Whether the trained generator collapsed, by the detectors that have shown to tell."""
    own = collapse_detectors(run)
    if not own and not any(BLUR in name for name in reactions(run)):
        return (
            "Blurred real images are not among the controls of this run, and blur alone makes "
            "twins: by this rule nothing can be said of collapse."
        )
    if not own:
        return "No detector tells collapse from the other defects here: there is no verdict."
    further = beyond_blur(run)
    towards = next(found for name, found in further.items() if COLLAPSED[1] in name)
    how = "as in a planted collapse, further than with blur"
    text, moved = moved_alike(further[GENERATED], own, towards, how)
    verdict = signs("mode collapse", moved, own) or "no mode collapse of this kind is seen"
    in_part = "; variety is lost in part" if 0 < len(moved) < len(own) else ""
    return f"{text} Verdict: {verdict}{in_part}."


def signs(fault: str, moved: Sequence[str], detectors: Sequence[str]) -> str:
    """Whether all or some detectors of a fault have moved; "" where none has."""
    if len(moved) == len(detectors):
        return f"every sign of {fault} is there"
    return f"some signs of {fault} are there and others not" if moved else ""


def moved_alike(
    found: Mapping[str, bool], detectors: Sequence[str], towards: Mapping[str, bool], how: str
) -> tuple[str, list[str]]:
    """Which detectors move on the trained generator the way that they move on a planted defect."""
    moved = [name for name in detectors if found.get(name) == towards[name]]
    still = [name for name in detectors if name not in moved]
    if not moved:
        return (f"On the trained generator {listed(still)} {verb('do', still)} not move {how}.", [])
    text = f"On the trained generator {listed(moved)} {verb('move', moved)} {how}"
    return text + (f", {listed(still)} {verb('do', still)} not." if still else "."), moved


def verb(word: str, subjects: Sequence[str]) -> str:
    """The verb of a sentence about one or several."""
    return word if len(subjects) > 1 else {"move": "moves", "do": "does"}[word]


def copying_reading(run: Run) -> str:
    """Whether the trained generator recites, by the detectors that catch copies."""
    towards = next(found for name, found in reactions(run).items() if COPIES in name)
    if not towards:
        return "Copies of training images are caught by no detector: recitation would go unseen."
    own = list(towards)
    text, moved = moved_alike(reactions(run)[GENERATED], own, towards, "the same way")
    verdict = signs("recitation", moved, own) or "no recitation is seen"
    return f"Copies of training images are caught by {listed(own)}. {text} Verdict: {verdict}."


def birthday_table(run: Run) -> pd.DataFrame:
    """The birthday test's estimate of the support, for every scenario."""
    rows = []
    for own in run.summary["birthday"]:
        shown = {"twins among": own["size"], "support": own["support"]}
        texts = {
            name: f"at least {short(value['mean'])}"
            if own["bounded"]
            else mean_with_interval(value)
            for name, value in shown.items()
        }
        rows.append({"images": own["scenario"], **texts})
    return pd.DataFrame(rows)


def class_table(run: Run, name: str) -> pd.DataFrame:
    """What was measured class by class, on real and on generated images: `class_histogram`, the
    shares of the classes, or `class_similarity`, MS-SSIM within each and between them; empty where
    the images have no labels."""
    table = [
        {"class": row["class"]}
        | {title: mean_with_interval(row[kind], 2) for kind, title in BY_CLASS.items()}
        for row in run.summary[name]
    ]
    return pd.DataFrame(table)


def similarity_reading(run: Run) -> str:
    """In which classes generated images differ less, or more, than real ones."""
    rows = [row for row in run.summary["class_similarity"] if row["generated"] and row["held_out"]]
    if not rows:
        return "Nothing can be compared class by class here."
    alike = [r["class"] for r in rows if r["generated"]["low"] > r["held_out"]["high"]]
    varied = [r["class"] for r in rows if r["generated"]["high"] < r["held_out"]["low"]]
    found = [f"more alike than real ones in {listed(alike)}"] if alike else []
    found += [f"less alike in {listed(varied)}"] if varied else []
    if not found:
        return "In no row do the two intervals of the classifier's columns lie apart."
    return f"Beyond both intervals, generated images are {'; '.join(found)}."


def classifier_reading(run: Run) -> str:
    """How far the classifier can be believed whose features measure the distances."""
    own = run.summary["classifier"]
    if not own:
        return "Without labels there is no classifier, and what needs one is left out."
    return (
        f"The classifier is right on {own['mean']:.1%} [{own['low']:.1%}, {own['high']:.1%}] of "
        f"the held-out images; always naming the largest class would be on {own['majority']:.1%}."
    )

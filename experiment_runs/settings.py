"""Where sources and results lie."""

from pathlib import Path

SOURCES = Path(__file__).resolve().parent.parent  # a checkout, or site-packages
# An installed package writes into the working directory, never beside itself.
PROJECT = SOURCES if (SOURCES / "report.qmd").is_file() else Path.cwd()
LOCAL = PROJECT / "results" / "local"
LIBRARIES = ("experiment_runs", "rlhf_jax", "gan_jax")  # whose code makes a run's numbers

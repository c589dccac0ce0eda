"""The revision of a run is that of its own sources, or unknown."""

import subprocess

import pytest

from experiment_runs import provenance


def committed(folder):
    """A repository with one commit of all that is in the folder; returns its short revision."""
    for command in (["init", "--quiet"], ["add", "."], ["commit", "--quiet", "-m", "x"]):
        subprocess.run(
            ["git", "-c", "user.name=a", "-c", "user.email=a@b", *command], cwd=folder, check=True
        )
    head = ["git", "rev-parse", "--short", "HEAD"]
    return subprocess.run(head, cwd=folder, capture_output=True, text=True).stdout.strip()


@pytest.fixture
def sources(tmp_path, monkeypatch):
    """The folder of some sources within another one."""
    folder = tmp_path / "100% of a thesis" / "rlhf"
    folder.mkdir(parents=True)
    (folder / "a.py").write_text("")
    monkeypatch.setattr(provenance, "SOURCES", folder)
    return folder


def test_the_revision_is_that_of_the_repository_of_the_sources(sources):
    revision = committed(sources)
    assert provenance.git_revision() == revision
    (sources / "a.py").write_text("changed")
    assert provenance.git_revision() == f"{revision}+"


def test_a_repository_around_the_sources_is_somebody_else_s(sources, monkeypatch):
    outer = committed(sources.parent)
    assert provenance.git_revision() == "unknown"
    monkeypatch.setenv("GIT_DIR", str(sources.parent / ".git"))  # as in a hook of that one
    assert provenance.git_revision() == "unknown"
    assert committed(sources) != outer

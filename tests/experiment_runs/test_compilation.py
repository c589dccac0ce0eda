import errno
import os
import subprocess
import sys

import jax
import pytest

from experiment_runs import compilation, settings
from experiment_runs.errors import UserError


@pytest.fixture
def no_folder_given():
    """Without the folder that the tests are given, which comes back."""
    names = ("jax_compilation_cache_dir", "jax_compilation_cache_max_size")
    before = {name: getattr(jax.config, name) for name in names}
    jax.config.update("jax_compilation_cache_dir", None)
    yield
    for name, value in before.items():
        jax.config.update(name, value)


def test_programs_are_kept_where_it_is_said_by_kind_of_processor(
    monkeypatch, tmp_path, no_folder_given
):
    monkeypatch.setenv("RLHF_COMPILATION_CACHE", str(tmp_path / "programs"))
    told = compilation.keep_programs()
    kept = tmp_path / "programs" / compilation.machine()
    assert jax.config.jax_compilation_cache_dir == str(kept) and f"kept in {kept}, at most" in told
    assert jax.config.jax_compilation_cache_max_size == compilation.MOST_GB * 10**9
    monkeypatch.setattr(compilation.Path, "read_text", lambda path: "flags : another")
    assert compilation.machine() != kept.name


def test_by_default_they_are_in_the_user_s_cache_and_off_means_nowhere(monkeypatch, tmp_path):
    monkeypatch.delenv("RLHF_COMPILATION_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert settings.compilation_cache("some") == tmp_path / "rlhf-jax" / "compiled" / "some"
    for off in ("off", "OFF", "0", "no"):
        monkeypatch.setenv("RLHF_COMPILATION_CACHE", off)
        assert settings.compilation_cache("some") is None


def test_nothing_is_kept_in_a_home_that_cannot_be_written_or_is_none(monkeypatch, tmp_path):
    monkeypatch.delenv("RLHF_COMPILATION_CACHE", raising=False)
    kept = tmp_path / "rlhf-jax" / "compiled" / "some"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert settings.compilation_cache("some") == kept
    monkeypatch.setattr(settings.tempfile, "TemporaryFile", refused)  # root may write anywhere
    assert settings.compilation_cache("some") is None
    monkeypatch.setenv("RLHF_COMPILATION_CACHE", str(tmp_path))
    with pytest.raises(UserError, match="nothing can be kept there .Read-only file system.*or off"):
        settings.compilation_cache("some")
    for name in ("HOME", "XDG_CACHE_HOME", "RLHF_COMPILATION_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(settings.os.path, "expanduser", lambda path: path)  # no entry in passwd
    assert settings.compilation_cache("some") is None


def refused(**options):
    raise OSError(errno.EROFS, os.strerror(errno.EROFS))


def test_a_folder_that_jax_was_given_is_left_as_it_is(monkeypatch, tmp_path):
    monkeypatch.setenv("RLHF_COMPILATION_CACHE", str(tmp_path))
    assert compilation.keep_programs() == f"kept in {jax.config.jax_compilation_cache_dir}"


def test_a_file_in_place_of_the_folder_is_named(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("RLHF_COMPILATION_CACHE", str(tmp_path / "file"))
    with pytest.raises(UserError, match="RLHF_COMPILATION_CACHE=.*file: nothing .*or off"):
        settings.compilation_cache("some")


PROGRAM = """
import jax
from experiment_runs.compilation import keep_programs
keep_programs()
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
for size in range(2, 12):
    print(float(jax.jit(lambda x: (x @ x).sum())(jax.numpy.ones((size, size)))))
"""


def test_several_processes_may_keep_the_same_programs_at_once(tmp_path, monkeypatch):
    """Each computes the same, and so does one that finds everything."""
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    monkeypatch.setenv("RLHF_COMPILATION_CACHE", str(tmp_path))
    monkeypatch.setenv("PYTHONWARNINGS", "error::UserWarning:jax")  # what cannot be read is told so
    command = [sys.executable, "-c", PROGRAM]
    pipes = {"stdout": subprocess.PIPE, "text": True, "cwd": settings.SOURCES}
    first = [subprocess.Popen(command, **pipes) for _ in range(3)]
    said = [process.communicate(timeout=120)[0] for process in first]
    kept = {path: path.read_bytes() for path in tmp_path.glob("*/*-cache")}
    again = subprocess.run(command, **pipes, timeout=120, check=True)
    assert len({*said, again.stdout}) == 1 and said[0].count("\n") == 10
    assert len(kept) >= 10
    assert {path: path.read_bytes() for path in tmp_path.glob("*/*-cache")} == kept


def test_after_a_kill_in_the_middle_of_writing_programs_are_kept_again(tmp_path, monkeypatch):
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    monkeypatch.setenv("RLHF_COMPILATION_CACHE", str(tmp_path))
    monkeypatch.setenv("PYTHONWARNINGS", "error::UserWarning:jax")
    run = [sys.executable, "-c", PROGRAM]
    subprocess.run(run, cwd=settings.SOURCES, timeout=120, check=True)
    whole, gone, *_ = sorted(tmp_path.glob("*/*-cache"))
    content = whole.read_bytes()
    whole.write_bytes(content[:100])
    for program in (whole, gone):
        program.with_name(program.name.removesuffix("-cache") + "-atime").unlink()
    gone.unlink()
    subprocess.run(run, cwd=settings.SOURCES, timeout=120, check=True)
    assert gone.exists() and len(whole.read_bytes()) == len(content)

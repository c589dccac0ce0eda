"""The stage as a whole: results, command line, exported generator."""

import resource

import numpy as np
import pytest
from safetensors import safe_open

from experiment_runs.errors import UserError
from experiment_runs.run import ensure
from gan_jax import experiment, export
from gan_jax.__main__ import Evaluate, execute, main, parsed
from gan_jax.config import GANConfig
from gan_jax.training import evaluated


def test_a_finished_run_holds_what_the_chapter_shows(finished, tiny):
    summary, metrics = finished.summary, finished.metrics()
    arrays = finished.arrays() | finished.arrays("real")
    assert list(metrics.columns) == ["step", "epoch", "d_fake", "d_real", "loss_d", "loss_g"]
    assert list(metrics["step"]) == [4, 8]
    for name, rows in (("generated", 4), ("real", 4), ("interpolation", 4), ("neighbours", 3)):
        assert arrays[name].shape == (rows, 8, 28, 28, 3) and arrays[name].dtype == np.uint8
    assert arrays["frames"].shape == (tiny.frames, 4, 8, 28, 28, 3)
    assert all(frame.any() for frame in arrays["frames"])
    confusion = np.array(summary["discriminator"]["confusion"])
    assert confusion.sum(axis=1).tolist() == [summary["held_out_images"]] * 2
    scenarios = {row["scenario"] for row in summary["detectors"]}
    assert {"real", "generated"} <= scenarios
    assert all({"mean", "low", "high", "caught"} <= row.keys() for row in summary["detectors"])
    gap, scores = summary["scores"]["gap"], summary["scores"]
    assert gap["mean"] == pytest.approx(scores["train"]["mean"] - scores["held_out"]["mean"])
    shares = [row["generated"] for row in summary["class_histogram"]]
    assert sum(share["mean"] for share in shares) == pytest.approx(1, abs=1e-4)
    assert all(share["low"] <= share["mean"] <= share["high"] for share in shares)
    for table, count in (("class_histogram", 7), ("class_similarity", 8)):
        assert len(summary[table]) == count, table


def test_a_finished_run_is_not_trained_again(finished, tiny, data_dir, monkeypatch):
    monkeypatch.setenv("RLHF_RESULTS", str(finished.path.parent))
    written = (finished.path / "summary.json").stat().st_mtime_ns
    again = experiment.run(tiny, data_dir=data_dir)
    assert again.path == finished.path
    assert (again.path / "summary.json").stat().st_mtime_ns == written


def test_what_stands_in_for_one_set_is_not_taken_for_another(finished, tiny, squares, monkeypatch):
    identified = []

    def ensure(*args, inputs):
        identified.append(inputs)
        return finished

    monkeypatch.setattr(experiment.data, "load", lambda *args, **kwargs: squares)
    monkeypatch.setattr(experiment, "ensure", ensure)
    for student_id in ("2", "4", "1"):
        experiment.run(tiny, student_id=student_id)
    assert identified[0] == identified[1] != identified[2]


def test_saved_networks_are_the_trained_ones(finished):
    cfg, networks, state = export.load_networks(finished)
    latents = np.random.default_rng(0).normal(size=(3, cfg.latents)).astype(np.float32)
    (images,) = evaluated(networks.generator, state.generator, latents)
    with safe_open(finished.path / "generator.safetensors", "numpy") as file:
        weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    np.testing.assert_allclose(by_loops(weights, latents), images, atol=1e-4)


def by_loops(weights, latents):
    """PyTorch's generator, written out: ConvTranspose2d as a scatter, BatchNorm2d in eval mode."""
    hidden = latents[:, :, None, None]
    for index in (0, 3, 6, 9, 12):
        kernel = weights[f"{index}.weight"]  # inputs, outputs, height, width
        size = kernel.shape[-1]
        stride, padding = (1, 0) if index == 0 else (1, 4) if size == 5 else (2, 1)
        count, _, rows, _ = hidden.shape
        side = (rows - 1) * stride + size
        output = np.zeros((count, kernel.shape[1], side, side))
        for row in range(rows):
            for column in range(rows):
                here = np.einsum("bi,iohw->bohw", hidden[:, :, row, column], kernel)
                top, left = row * stride, column * stride
                output[:, :, top : top + size, left : left + size] += here
        hidden = output[:, :, padding : side - padding, padding : side - padding]
        if index < 12:
            norm = {
                name: weights[f"{index + 1}.{name}"][:, None, None]
                for name in ("weight", "bias", "running_mean", "running_var")
            }
            scaled = (hidden - norm["running_mean"]) / np.sqrt(norm["running_var"] + 1e-5)
            hidden = np.maximum(scaled * norm["weight"] + norm["bias"], 0)
    return np.tanh(hidden).transpose(0, 2, 3, 1)


def test_the_model_card_tells_data_training_use_results_and_limits(finished):
    card = (finished.path / "README.md").read_text()
    assert card.startswith("---\n") and finished.summary["source"] in card
    compile(card.split("```")[1].removeprefix("python"), "README.md", "exec")
    assert "8 updates, 0.8 epochs" in card and "no medical use" in card
    rows = {
        (row["scenario"], row["detector"]): row["mean"] for row in finished.summary["detectors"]
    }
    assert f"| fid | {rows['real', 'fid']:.3g} | {rows['generated', 'fid']:.3g} |" in card
    assert "| widths | [16, 8, 8, 4] |" in card


@pytest.mark.interop
def test_pytorch_draws_the_same_images_by_the_ten_lines_of_the_model_card(
    finished, tmp_path, monkeypatch
):
    torch = pytest.importorskip("torch", reason="needs the extra `interop`")
    monkeypatch.chdir(finished.path)
    code = (finished.path / "README.md").read_text().split("```")[1].removeprefix("python")
    names = {}
    exec(code, names)
    latents = torch.randn(3, 100, 1, 1)
    with torch.no_grad():
        expected = names["generator"](latents).permute(0, 2, 3, 1).numpy()
    _, networks, state = export.load_networks(finished)
    (images,) = evaluated(networks.generator, state.generator, latents[:, :, 0, 0].numpy())
    np.testing.assert_allclose(images, expected, atol=1e-4)


def test_options_start_from_the_profile_that_is_named():
    command = parsed(["train", "--profile", "study", "--batch", "32", "--draws", "4"])
    assert command.cfg.widths == (256, 128, 64, 32)
    assert command.cfg.batch == 32 and command.cfg.evidence.draws == 4


@pytest.mark.parametrize("command", [[], ["train"], ["evaluate"]])
def test_help_explains_each_command(command, capsys):
    with pytest.raises(SystemExit) as end:
        parsed([*command, "--help"])
    assert end.value.code == 0
    shown = capsys.readouterr().out
    assert "detector" in shown or "evidence" in shown


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["train", "--profile", "huge"], "profile 'huge': unknown; use one of tiny, cpu"),
        (["train", "--student-id", "x"], "student ID 'x'"),
        (["train", "--dataset", "nope"], "dataset 'nope'"),
        (["train", "--side", "32"], "GANConfig.side=32 is impossible: must be 28 or 64"),
        (["train", "--neighbours", "0"], "neighbours is 0"),
        (["evaluate", "/nowhere"], "/nowhere: not a run"),
        (["train", "--data-dir", "/nowhere"], "--data-dir /nowhere: no such folder"),
        (["evaluate", "x", "--data-dir", "/nowhere"], "--data-dir /nowhere: no such folder"),
    ],
)
def test_bad_input_ends_with_one_message_and_code_2(arguments, message, capsys):
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert end.value.code == 2
    shown = capsys.readouterr().err
    assert message in shown and "Traceback" not in shown


def test_evaluate_prints_the_table_of_a_run_and_leaves_the_run_alone(finished, data_dir, capsys):
    before = (finished.path / "summary.json").read_bytes()
    options = ["--data-dir", str(data_dir), "--images", "32", "--draws", "2"]
    main(["evaluate", str(finished.path), *options, "--classifier-steps", "4"])
    assert "generated" in capsys.readouterr().out
    assert (finished.path / "summary.json").read_bytes() == before


def test_a_run_without_its_networks_says_so(finished, tmp_path):
    for name in ("config.json", "summary.json"):
        (tmp_path / name).write_bytes((finished.path / name).read_bytes())
    with pytest.raises(UserError, match="no weights there"):
        export.load_networks(type(finished)(tmp_path))


def test_networks_that_a_full_disk_does_not_take_are_one_message(finished, tmp_path, monkeypatch):
    _, networks, state = export.load_networks(finished)
    monkeypatch.setattr(export, "save_weights", lambda *_: None)
    (tmp_path / "config.json").write_bytes((finished.path / "config.json").read_bytes())
    own = type(finished)(tmp_path)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with pytest.raises(UserError, match="generator.safetensors: cannot be written .*make room"):
            export.save_networks(own, networks, state)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_run_of_another_stage_has_no_evidence(tmp_path):
    other = ensure("reward", GANConfig(), lambda run: run.finish(), inputs={}, root=tmp_path)
    with pytest.raises(UserError, match="a run of stage 'reward'; name one of 'gan'"):
        execute(Evaluate(run=other.path))


def test_networks_that_no_memory_holds_are_refused():
    with pytest.raises(UserError, match="the generator would have .* weights; needs less than"):
        GANConfig(widths=(8192,) * 4)


@pytest.mark.parametrize("sizes", [{"batch": 2**14}, {"batch": 2**15, "dispatch_steps": 10**4}])
def test_a_batch_that_no_memory_holds_is_refused(sizes):
    with pytest.raises(UserError, match="batch is .* values; needs less than"):
        GANConfig(widths=(64, 32, 16, 32), **sizes)

"""Image sets: what is read, what is chosen, and what a broken file is told."""

import hashlib
import socket

import numpy as np
import pytest

from gan_jax import data
from reporting.runs import UserError


@pytest.fixture
def arrays(data_dir):
    with np.load(data_dir / "medmnist" / "dermamnist.npz") as file:
        return dict(file)


@pytest.fixture
def offline(monkeypatch, tmp_path):
    """No network, and an empty home directory."""

    def refuse(*args, **kwargs):
        raise OSError("Network is unreachable")

    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))


def load(folder, name="dermamnist", student_id=None, side=28):
    return data.load(name, side=side, data_dir=folder, student_id=student_id)


def written(tmp_path, arrays, name="dermamnist"):
    (tmp_path / "medmnist").mkdir(exist_ok=True)
    np.savez(tmp_path / "medmnist" / f"{name}.npz", **arrays)
    return tmp_path


def test_validation_and_test_images_are_held_out(squares, arrays):
    np.testing.assert_array_equal(squares.train, arrays["train_images"])
    held_out = np.concatenate([arrays["val_images"], arrays["test_images"]])
    np.testing.assert_array_equal(squares.held_out, held_out)
    np.testing.assert_array_equal(squares.train_labels.argmax(axis=1), arrays["train_labels"][:, 0])
    assert len(squares.classes) == 7 and "not the official file" in squares.source


def test_grey_images_get_a_channel_and_several_findings_share_their_mass(tmp_path):
    random = np.random.default_rng(0)
    labels = random.integers(2, size=(9, 14), dtype=np.uint8)
    labels[0] = 0
    images = random.integers(256, size=(9, 28, 28), dtype=np.uint8)
    arrays = {
        f"{s}_{k}": v for s in data.SPLITS for k, v in (("images", images), ("labels", labels))
    }
    chest = load(written(tmp_path, arrays, "chestmnist"), name=None, student_id="13")
    assert chest.name == "chestmnist" and chest.train.shape == (9, 28, 28, 1)
    assert chest.classes[-1] == "no finding" and chest.train_labels[0, -1] == 1
    np.testing.assert_allclose(chest.train_labels.sum(axis=1), 1, rtol=1e-6)
    positive = labels[1] > 0
    np.testing.assert_allclose(chest.train_labels[1, :-1][positive], 1 / positive.sum(), rtol=1e-6)


@pytest.mark.parametrize(
    "student_id, name", [("2024110", "dermamnist"), ("7", "chestmnist"), (None, "dermamnist")]
)
def test_the_last_digit_of_the_student_id_chooses(student_id, name):
    assert data.dataset_for(student_id) == name


@pytest.mark.parametrize("student_id", ["", "12x", "x12", "1.2"])
def test_a_student_id_that_is_not_a_number_is_refused(student_id):
    with pytest.raises(UserError, match="not a number"):
        data.dataset_for(student_id)


def broken(arrays, **changes):
    return {name: value for name, value in (arrays | changes).items() if value is not None}


@pytest.mark.parametrize(
    "change, message",
    [
        ({"val_labels": None}, "lacks val_labels"),
        ({"train_images": np.zeros((160, 28, 28), np.uint8)}, r"uint8\[160, 28, 28\], needs"),
        ({"train_images": np.zeros((160, 28, 28, 3))}, r"float64\[160, 28, 28, 3\], needs uint8"),
        ({"test_images": np.zeros((0, 28, 28, 3), np.uint8)}, r"test_images is uint8\[0, "),
        ({"train_labels": np.zeros((3, 1), np.uint8)}, r"train_labels is uint8\[3, 1\]"),
        ({"train_labels": np.full((160, 1), 9)}, "runs from 9 to 9, needs 0 to 6"),
        ({"train_labels": np.array([[None]] * 160)}, "not a readable npz file of plain arrays"),
    ],
)
def test_a_wrong_file_is_told_by_name_key_and_remedy(tmp_path, arrays, change, message):
    with pytest.raises(UserError, match=message) as error:
        load(written(tmp_path, broken(arrays, **change)))
    assert "dermamnist.npz" in str(error.value)


def test_all_problems_of_a_file_are_told_at_once(tmp_path, arrays):
    wrong = {"train_images": np.zeros((160, 28, 28, 3)), "val_labels": np.zeros((1, 1), np.uint8)}
    with pytest.raises(UserError, match="train_images.*val_labels"):
        load(written(tmp_path, arrays | wrong))


@pytest.mark.parametrize("content", [b"", b"no archive", b"PK\x03\x04 cut off"])
def test_a_damaged_file_is_told(tmp_path, content):
    (tmp_path / "medmnist").mkdir()
    (tmp_path / "medmnist" / "dermamnist.npz").write_bytes(content)
    with pytest.raises(UserError, match="dermamnist.npz: not a readable npz file"):
        load(tmp_path)


def test_an_unknown_set_is_told_with_those_that_exist():
    with pytest.raises(UserError, match="dataset 'organmnist3d': not a 2D.*dermamnist.*histology"):
        load(None, name="organmnist3d")


def test_offline_a_named_set_is_missed_and_an_unnamed_one_replaced_and_said(offline, tmp_path):
    with pytest.raises(UserError, match="dermamnist.*cannot be fetched.*put the file into"):
        load(tmp_path)
    images = load(tmp_path, name=None, student_id="7")
    assert images.name == "histology" and "in place of chestmnist" in images.source


def test_a_download_is_kept_only_if_its_checksum_is_right(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    origin = tmp_path / "origin"
    origin.write_bytes(b"images")
    right = hashlib.md5(b"images").hexdigest()
    with pytest.raises(UserError, match="MD5 is .*, the registry says 0"):
        data.download(origin.as_uri(), "0", "x.npz")
    assert not list((tmp_path / ".medmnist").iterdir())
    path = data.download(origin.as_uri(), right, "x.npz")
    assert path.read_bytes() == b"images"
    origin.unlink()
    assert data.download(origin.as_uri(), right, "x.npz") == path


def test_the_section_is_split_by_region():
    from skimage.data import immunohistochemistry

    images = data.histology(28, "")
    section = immunohistochemistry()
    np.testing.assert_array_equal(images.train[0], section[:28, :28])
    np.testing.assert_array_equal(images.held_out[0], section[:28, 384:412])
    np.testing.assert_array_equal(images.train[-1], section[483:511, 350:378])
    assert images.train_labels is None and images.classes == ()


def test_the_registry_is_read_without_pytorch():
    assert data.registry().INFO["dermamnist"]["n_channels"] == 3

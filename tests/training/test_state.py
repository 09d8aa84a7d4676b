import shutil
from pathlib import Path

import pytest
import torch

from domainstudio.errors import UserError
from domainstudio.training.state import (
    TrainState,
    find_checkpoint,
    list_checkpoints,
    load_checkpoint,
    remove_whole,
    save_checkpoint,
    written_whole,
)


def make_state(step: int = 3, average: bool = True) -> TrainState:
    weight = torch.nn.Parameter(torch.randn(30, 20, generator=torch.Generator().manual_seed(step)))
    optimizer = torch.optim.AdamW([weight], lr=0.1)
    weight.square().sum().backward()
    optimizer.step()
    moved = weight.detach()
    return TrainState(
        step, {"w": moved, "turned": moved.T}, [moved * 2] * average, optimizer.state_dict(), {"scale": 8.0}
    )


@pytest.mark.parametrize("average", [True, False])
def test_a_checkpoint_comes_back_as_it_was(tmp_path, average):
    state = make_state(average=average)
    path = save_checkpoint(tmp_path, state)
    assert path == tmp_path / "checkpoint-3"
    back = load_checkpoint(path)
    assert (back.step, back.scaler) == (3, {"scale": 8.0})
    assert back.student.keys() == state.student.keys()
    assert all(torch.equal(back.student[name], state.student[name]) for name in state.student)
    assert len(back.average) == average
    assert all(torch.equal(a, b) for a, b in zip(back.average, state.average, strict=True))
    assert back.optimizer["param_groups"] == state.optimizer["param_groups"]
    for name, value in state.optimizer["state"][0].items():
        assert torch.equal(back.optimizer["state"][0][name], value)


def test_averages_keep_their_order_beyond_ten(tmp_path):
    state = make_state()
    state.average = [torch.full((2,), float(i)) for i in range(25)]
    assert [a[0].item() for a in load_checkpoint(save_checkpoint(tmp_path, state)).average] == list(range(25))


@pytest.mark.parametrize("kept", [0, 0.01, 0.5, 0.95])
@pytest.mark.parametrize("name", ["student.safetensors", "average.safetensors", "optimizer.pt", "state.json"])
def test_a_cut_off_checkpoint_is_told(tmp_path, name, kept):
    path = save_checkpoint(tmp_path, make_state())
    content = (path / name).read_bytes()
    (path / name).write_bytes(content[: int(len(content) * kept)])
    with pytest.raises(UserError, match=r"checkpoint-3 is not a usable checkpoint .*; resume from another"):
        load_checkpoint(path)


@pytest.mark.parametrize("name", ["student.safetensors", "optimizer.pt", "state.json"])
def test_a_checkpoint_with_a_file_missing_is_told(tmp_path, name):
    path = save_checkpoint(tmp_path, make_state())
    (path / name).unlink()
    with pytest.raises(UserError, match="not a usable checkpoint"):
        load_checkpoint(path)


def test_the_newest_checkpoints_are_kept(tmp_path):
    for step in (5, 9, 10, 100):
        save_checkpoint(tmp_path, make_state(step), total_limit=2)
    assert list_checkpoints(tmp_path) == [(10, tmp_path / "checkpoint-10"), (100, tmp_path / "checkpoint-100")]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint-10", "checkpoint-100"]
    save_checkpoint(tmp_path, make_state(101))
    assert len(list_checkpoints(tmp_path)) == 3, "no limit, nothing removed"


def test_checkpoints_are_listed_by_number_and_nothing_else_is(tmp_path):
    for name in ("checkpoint-10", "checkpoint-9", ".checkpoint-11.partial", ".checkpoint-8.removed", "checkpoint-best"):
        (tmp_path / name).mkdir()
    (tmp_path / "checkpoint-12").write_text("a file")
    assert [step for step, _ in list_checkpoints(tmp_path)] == [9, 10]
    assert list_checkpoints(tmp_path / "nowhere") == []


def test_finding_a_checkpoint(tmp_path, monkeypatch):
    assert find_checkpoint(tmp_path, "latest") is None
    for step in (9, 10):
        (tmp_path / f"checkpoint-{step}").mkdir()
    assert find_checkpoint(tmp_path, "latest") == tmp_path / "checkpoint-10"
    assert find_checkpoint(tmp_path, "checkpoint-9") == tmp_path / "checkpoint-9"
    assert find_checkpoint(tmp_path / "elsewhere", str(tmp_path / "checkpoint-9")) == tmp_path / "checkpoint-9"
    with pytest.raises(UserError, match=r"no checkpoint 'checkpoint-11'.*holds: checkpoint-9, checkpoint-10\. Give"):
        find_checkpoint(tmp_path, "checkpoint-11")
    with pytest.raises(UserError, match="holds: none yet"):
        find_checkpoint(tmp_path / "elsewhere", "checkpoint-1")


def write(folder: Path, text: str) -> None:
    with written_whole(folder) as inside:
        (inside / "sub").mkdir()
        (inside / "sub" / "content").write_text(text)


def read(folder: Path) -> str:
    return (folder / "sub" / "content").read_text()


@pytest.mark.parametrize("old", [True, False])
def test_failing_while_writing_leaves_what_was_there(tmp_path, old):
    folder = tmp_path / "deep" / "result"
    if old:
        write(folder, "old")

    def fail():
        with written_whole(folder) as inside:
            (inside / "half").write_text("new")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert read(folder) == "old" if old else not folder.exists()
    write(folder, "new")  # the failed attempt is not in the way
    assert read(folder) == "new"
    assert [p.name for p in folder.parent.iterdir()] == ["result"]
    assert [p.name for p in folder.iterdir()] == ["sub"]


def test_a_kill_while_the_old_content_is_removed_leaves_the_new(tmp_path, monkeypatch):
    folder = tmp_path / "result"
    write(folder, "old")
    original = shutil.rmtree

    def killed(path, *args, **kwargs):
        if Path(path).name == ".result.removed" and Path(path).exists():
            raise KeyboardInterrupt
        original(path, *args, **kwargs)

    monkeypatch.setattr(shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        write(folder, "new")
    monkeypatch.undo()
    assert read(folder) == "new"
    write(folder, "newer")  # the leftovers are not in the way
    assert [p.name for p in tmp_path.iterdir()] == ["result"]


def test_nothing_is_seen_under_the_name_before_it_is_whole(tmp_path):
    folder = tmp_path / "checkpoint-1"
    with written_whole(folder) as inside:
        assert not folder.exists()
        assert list_checkpoints(tmp_path) == []
        assert inside.parent == tmp_path
    assert list_checkpoints(tmp_path) == [(1, folder)]


def test_removing_is_whole_too(tmp_path, monkeypatch):
    folder = tmp_path / "result"
    remove_whole(folder)
    write(folder, "old")

    def killed(path, *args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        remove_whole(folder)
    monkeypatch.undo()
    assert not folder.exists(), "no half of it is left under its name"
    write(folder, "new")
    remove_whole(folder)
    assert list(tmp_path.iterdir()) == []


def test_an_old_checkpoint_goes_only_after_the_new_one_is_in_place(tmp_path, monkeypatch):
    save_checkpoint(tmp_path, make_state(1), total_limit=1)
    monkeypatch.setattr(torch, "save", lambda *args: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        save_checkpoint(tmp_path, make_state(2), total_limit=1)
    monkeypatch.undo()
    assert load_checkpoint(tmp_path / "checkpoint-1").step == 1
    assert [step for step, _ in list_checkpoints(tmp_path)] == [1]

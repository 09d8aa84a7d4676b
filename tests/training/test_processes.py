"""Two processes make the steps of one. `processes_cases.py` is what each of them runs."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import DistributedType
from processes_cases import CASES, STOPPED, TOO_MANY, steps_of

from domainstudio.errors import UserError
from domainstudio.training.processes import ALONE, Processes, _buckets

pytest_plugins = "text_kit"

HERE = Path(__file__).parent
WORLD = 2


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


@pytest.fixture(scope="module")
def folders(pipelines, text_pipelines) -> dict[str, str]:
    names = {case.pipeline for case in (*CASES, STOPPED, TOO_MANY)}
    return {name: str((text_pipelines if name.startswith("sd") else pipelines)(name)) for name in names}


@pytest.fixture(scope="module")
def company(folders, tmp_path_factory):
    """What each of two processes saw of all cases, by rank."""
    outputs = [tmp_path_factory.mktemp("company") / f"{rank}.pt" for rank in range(WORLD)]
    shared = {
        **os.environ,
        **{"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "WORLD_SIZE": str(WORLD)},
        **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())},
        "PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parent), *sys.path]),
    }
    processes = [
        subprocess.Popen(
            [sys.executable, str(HERE / "processes_cases.py"), json.dumps(folders), str(rank), str(output)],
            env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank, output in enumerate(outputs)
    ]
    try:
        assert [process.wait(timeout=300) for process in processes] == [0] * WORLD
    finally:
        for process in processes:
            process.kill()
    return [torch.load(output) for output in outputs]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_two_processes_make_the_steps_of_one(company, folders, case):
    alone = steps_of(case, Path(folders[case.pipeline]))
    ours, theirs = (seen[case.name] for seen in company)
    assert ours["metrics"] == theirs["metrics"], "every process knows the losses of the global batch"
    assert all(map(torch.equal, ours["weights"], theirs["weights"]))
    for step, one in zip(ours["metrics"], alone["metrics"], strict=True):
        assert step == pytest.approx(one, rel=1e-10)
    largest = max(gradient.abs().max() for gradient in alone["gradients"])
    assert largest > 1e-4
    for two, one in zip(ours["gradients"], alone["gradients"], strict=True):
        assert (two - one).abs().max() < 1e-12 * largest
    for two, one in zip(ours["weights"], alone["weights"], strict=True):
        assert (two - one).abs().max() < 1e-8


def test_one_that_stops_ends_all(company):
    assert [seen["stopped"] for seen in company] == [2] * WORLD


def test_more_processes_than_pictures_are_refused(company):
    for seen in company:
        assert "train_batch_size=1 over 2 processes" in seen["refused"]
        assert "use train_batch_size >= 2, or start at most 1" in seen["refused"]


@pytest.mark.parametrize("num", [3, 4, 7, 12])
def test_every_row_belongs_to_one_process(num):
    rows = [Processes(index, 3).rows(num) for index in range(3)]
    assert [row for share in rows for row in share] == list(range(num))
    assert max(map(len, rows)) - min(map(len, rows)) <= 1


def test_dropout_differs_between_processes_and_not_from_before_in_the_first():
    seeds = [Processes(index, 4).own_seed(2**63 - 5) for index in range(4)]
    assert seeds[0] == 2**63 - 5
    assert len(set(seeds)) == 4
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_too_few_pictures_to_share_are_made_by_each():
    assert torch.equal(Processes(2, 4).share(3, lambda rows: torch.tensor(rows)), torch.arange(3))


def test_one_process_computes_as_if_there_were_no_others():
    def function(x):
        return x

    assert ALONE.spread(function) is function
    assert ALONE.everyone("x") == ["x"]
    own = torch.ones(2)
    assert ALONE.gather(own, 2) is own


def test_gradients_are_sent_in_buckets(monkeypatch):
    monkeypatch.setattr("domainstudio.training.processes._BUCKET", 10)
    sizes = [[t.numel() for t in bucket] for bucket in _buckets([torch.zeros(n) for n in (4, 5, 6, 20, 1, 1)])]
    assert sizes == [[4, 5, 6], [20], [1, 1]]


@pytest.mark.parametrize("kind", ["FSDP", "DEEPSPEED", "MEGATRON_LM", "XLA"])
def test_models_in_parts_are_refused(kind):
    with pytest.raises(UserError, match=f"asks for {kind}, which is not supported; choose multi-GPU"):
        Processes.of(SimpleNamespace(distributed_type=DistributedType[kind]))  # pyright: ignore[reportArgumentType]


def test_processes_that_were_not_joined_are_refused(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    lonely = SimpleNamespace(distributed_type=DistributedType.NO, num_processes=1)
    with pytest.raises(UserError, match=r"2 processes were started.*ACCELERATE_USE_CPU=true"):
        Processes.of(lonely)  # pyright: ignore[reportArgumentType]

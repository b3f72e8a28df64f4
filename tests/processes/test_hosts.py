"""Hosts in network namespaces, each with a disk of its own, train one run and survive the loss of a host or a disk."""

import functools
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.hosts import Host, connected_hosts
from support.processes import ROOT, TINY, write_images
from support.runs import lines

from resnext_hub.record import RunRecord

LIMIT = 300
"""Seconds after which a test gives up on a process, on a busy machine."""

SCRIPT = ROOT / "scripts" / "train.py"

FLAGS = (
    *TINY, "--dataset", "vehicles", "--image-size", 32, "--batch-size", 12, "--max-steps", 16, "--lr", 0.01,
    "--checkpoint-every", 4, "--ema", 0.9, "--max-bad-fraction", 0.5, "--log-samples", "--output-dir", "run",
)  # fmt: skip

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def vehicles(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of classes with an unreadable image."""
    root = tmp_path_factory.mktemp("hosts") / "vehicles"
    for split, count in (("train", 24), ("validation", 8)):
        for name, shade in (("bus", 60), ("car", 130)):
            write_images(root / split / name, count, shade)
    (root / "train" / "bus" / "001.png").write_bytes(b"no image")
    return root


def start(hosts: list[Host], *flags: object, port: int = 29500) -> "list[subprocess.Popen[str]]":
    """Start one process on each host, with the variables that a launcher sets; the first host is the main one."""
    place = {"WORLD_SIZE": str(len(hosts)), "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    place |= {"MASTER_ADDR": hosts[0].address, "MASTER_PORT": str(port)}
    return [host.start([SCRIPT, *flags], RANK=str(rank), **place) for rank, host in enumerate(hosts)]


def finish(started: "list[subprocess.Popen[str]]") -> list[tuple[int, str, str]]:
    """Wait for processes; return their exit codes, outputs and errors."""
    try:
        texts = [process.communicate(timeout=LIMIT) for process in started]
    finally:
        for process in started:
            process.kill()
            process.wait()
    return [(process.returncode, out, err) for process, (out, err) in zip(started, texts, strict=True)]


def succeed(started: "list[subprocess.Popen[str]]") -> list[str]:
    """Wait for processes that have to succeed; return their errors."""
    ended = finish(started)
    assert [code for code, _, _ in ended] == [0] * len(ended), ended
    return [err for _, _, err in ended]


def wait_for(path: Path, run: "subprocess.Popen[str]") -> None:
    deadline = time.monotonic() + LIMIT
    while not path.exists() and time.monotonic() < deadline:
        assert run.poll() is None, run.communicate()
        time.sleep(0.005)


def global_batches(folders: list[Path]) -> list[list[tuple[int, str]]]:
    """Return index and pixel hash of each sample of each step, over the processes of a run."""
    logs = [lines(folder / f"samples-{rank}.jsonl") for rank, folder in enumerate(folders)]
    return [
        [pair for line in step for pair in zip(line["indices"], line["pixels"], strict=True)]  # type: ignore[call-overload]
        for step in zip(*logs, strict=True)
    ]


def same_weights(one: Path, other: Path) -> None:
    for name in ("model/model.safetensors", "checkpoints/step-00000016/ema.safetensors"):
        a, b = load_file(one / name), load_file(other / name)
        assert a.keys() == b.keys()
        assert all(torch.equal(a[key], b[key]) for key in a), name


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, vehicles: Path) -> Callable[[int], list[Path]]:
    """Return the run folders on each of a number of hosts after an uninterrupted run."""

    @functools.cache
    def run(count: int) -> list[Path]:
        folder = tmp_path_factory.mktemp("alone")
        with connected_hosts(count, folder) as hosts:
            for host in hosts:
                shutil.copytree(vehicles, host.disk / "vehicles")
            errors = succeed(start(hosts, *FLAGS))
            for host in hosts[1:]:
                assert f"{host.name}:{folder / 'disk' / 'run' / f'samples-{host.rank}.jsonl'}" in errors[0]
                assert [path.name for path in (host.disk / "run").iterdir()] == [f"samples-{host.rank}.jsonl"]
            return [host.disk / "run" for host in hosts]

    return run


@pytest.mark.parametrize("count", [2, 3])
def test_hosts_that_lose_a_process_and_a_disk_resume_bit_for_bit(
    tmp_path: Path, vehicles: Path, alone: Callable[[int], list[Path]], count: int
) -> None:
    folders = alone(count)
    with connected_hosts(count, tmp_path) as hosts:
        for host in hosts:
            shutil.copytree(vehicles, host.disk / "vehicles")
        main = hosts[0]
        started = start(hosts, *FLAGS)
        wait_for(main.disk / "run" / "checkpoints" / "step-00000004", started[0])
        started[-1].send_signal(signal.SIGKILL)
        ended = finish(started)
        assert ended[0][0] == 1
        assert "lost the connection to another process of the run" in ended[0][2]

        shutil.rmtree(hosts[-1].disk / "run")  # the disk of the host is lost as well
        shutil.copytree(main.disk / "run", main.disk / "one")
        errors = succeed(start(hosts, *FLAGS, port=29502))
        assert "resuming from step-" in errors[0]
        same_weights(folders[0], main.disk / "run")
        record = RunRecord.load(main.disk / "run" / "record.json")
        assert (record.processes, record.resumes, len(record.unreadable_images)) == (count, 1, 1)

        # all other disks are lost: the run goes on with one process, on the same data
        (error,) = succeed(start([main], *FLAGS, "--output-dir", "one"))
        assert f"processes: {count} before the resume, 1 now" in error
        whole = global_batches(folders)
        resumed = lines(main.disk / "one" / "samples-0.jsonl")
        first = next(index for index, line in enumerate(resumed) if len(line["indices"]) == 12)  # type: ignore[arg-type]
        assert 4 <= first < 16
        assert whole[first:] == global_batches([main.disk / "one"])[first:]


def test_a_run_is_not_repeated_because_another_host_became_the_main_one(tmp_path: Path, vehicles: Path) -> None:
    with connected_hosts(2, tmp_path) as hosts:
        for host in hosts:
            shutil.copytree(vehicles, host.disk / "vehicles")
        succeed(start(hosts[:1], *FLAGS))
        (code, _, error), (other_code, _, _) = finish(start(hosts[::-1], *FLAGS, port=29501))
        assert (code, other_code) == (2, 2), error
        assert (
            "error: host host-0 has a later checkpoint of this run in run, at step 16, but host host-1 (rank 0)"
            in error
        )
        assert "has none; give rank 0 to host-0, copy the run folder from there" in error
        assert not (hosts[1].disk / "run" / "checkpoints").exists()


def trainers(agent: int) -> list[int]:
    """Return the processes that a torchrun agent has started."""
    path = Path(f"/proc/{agent}/task/{agent}/children")
    return [int(pid) for pid in path.read_text().split()]


def test_torchrun_restarts_a_killed_trainer_and_takes_back_a_host_that_was_away(
    tmp_path: Path, vehicles: Path, alone: Callable[[int], list[Path]]
) -> None:
    (folder, _) = alone(2)
    with connected_hosts(2, tmp_path) as hosts:
        for host in hosts:
            shutil.copytree(vehicles, host.disk / "vehicles")
        launcher = ("-m", "torch.distributed.run", "--nnodes", 2, "--nproc_per_node", 1, "--max-restarts", 3)
        launcher += ("--master_addr", hosts[0].address, "--master_port", 29501)

        def torchrun(host: Host) -> "subprocess.Popen[str]":
            return host.start([*launcher, "--node_rank", host.rank, SCRIPT, *FLAGS])

        agents = [torchrun(host) for host in hosts]
        checkpoints = hosts[0].disk / "run" / "checkpoints"
        wait_for(checkpoints / "step-00000004", agents[0])
        os.kill(trainers(agents[0].pid)[0], signal.SIGKILL)
        wait_for(checkpoints / "step-00000008", agents[0])
        doomed = [*trainers(agents[1].pid), agents[1].pid]  # the second host is switched off, and comes back
        for pid in doomed:
            os.kill(pid, signal.SIGKILL)
        agents[1].communicate()
        agents[1] = torchrun(hosts[1])
        succeed(agents)
        same_weights(folder, hosts[0].disk / "run")
        assert RunRecord.load(hosts[0].disk / "run" / "record.json").resumes == 2


def test_three_hosts_with_different_settings_refuse_and_name_host_and_field(tmp_path: Path, vehicles: Path) -> None:
    with connected_hosts(3, tmp_path) as hosts:
        for host in hosts:
            shutil.copytree(vehicles, host.disk / "vehicles")
        started = []
        place = {"WORLD_SIZE": "3", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
        place |= {"MASTER_ADDR": hosts[0].address, "MASTER_PORT": "29500"}
        for host in hosts:
            lr = 0.5 if host.rank == 2 else 0.01
            started.append(host.start([SCRIPT, *FLAGS, "--lr", lr], RANK=str(host.rank), **place))
        for code, _, error in finish(started):
            assert code == 2
            assert error.count("error: ") == 1
            assert "error: host host-2 (rank 2) has --lr 0.5, but rank 0 has 0.01; start every process" in error
        assert not any((host.disk / "run").exists() for host in hosts)

"""Processes on several hosts without a shared disk train one run, or all refuse it for the same reason."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support import warm_start
from support.processes import ROOT, TINY, run_process, write_images

from resnext_hub.errors import RequestError
from resnext_hub.processes.launcher import Place
from resnext_hub.record import RunRecord
from resnext_hub.training import stop

LIMIT = 240
"""Seconds after which a test gives up on a process, on a busy machine."""


@dataclass
class Ended:
    """A process that has ended."""

    code: int
    out: str
    err: str
    at: float
    """Time of its end on the monotonic clock, in seconds."""

    @property
    def errors(self) -> list[str]:
        """Its error lines."""
        return [line for line in self.err.splitlines() if line.startswith("error: ")]


class Hosts:
    """Starts one process for each host, in a working folder of its own that stands in for the disk of the host."""

    def __init__(self, folder: Path, size: int = 2) -> None:
        self.folders = [folder / f"host-{rank}" for rank in range(size)]
        for path in self.folders:
            path.mkdir(parents=True, exist_ok=True)

    def start(self, *commands: Sequence[object], **environment: Sequence[str]) -> "list[subprocess.Popen[str]]":
        """Start a command on each host; environment variables have one value per host."""
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        started = []
        for rank, (folder, words) in enumerate(zip(self.folders, commands, strict=True)):
            variables = {name: values[rank] for name, values in environment.items()}
            place = {"RANK": str(rank), "WORLD_SIZE": str(len(self.folders)), "LOCAL_RANK": "0"}
            place |= {"LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            started.append(
                warm_start.Popen(
                    [sys.executable, *map(str, words)],
                    cwd=folder,
                    env=os.environ | {"OMP_NUM_THREADS": "1"} | place | variables,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    text=True,
                )
            )
        return started

    def train(self, *flags: Sequence[object], **environment: Sequence[str]) -> list[Ended]:
        """Train with the flags of each host, and wait for all processes."""
        return wait(self.start(*((ROOT / "scripts" / "train.py", *each) for each in flags), **environment))


def wait(started: "list[subprocess.Popen[str]]") -> list[Ended]:
    """Wait for processes, and kill those that exceed the limit."""
    ended: dict[int, float] = {}
    begin = time.monotonic()
    try:
        while len(ended) < len(started) and time.monotonic() < begin + LIMIT:
            for process in started:
                if process.poll() is not None:
                    ended.setdefault(process.pid, time.monotonic())
            time.sleep(0.05)
    finally:
        for process in started:
            process.kill()
    texts = [process.communicate() for process in started]
    return [
        Ended(process.returncode, out, err, ended.get(process.pid, float("inf")))
        for process, (out, err) in zip(started, texts, strict=True)
    ]


PAIR = """
import json, torch
from resnext_hub.processes import peers as agreement
from resnext_hub.errors import RequestError, RunError
peers = agreement.join()

def fresh():
    return agreement.Peers(peers.rank, peers.size, peers._group)

def fails(error, where):
    if peers.rank in where:
        raise error
    return peers.rank

def attempt(work):
    try:
        return {"value": work(fresh())}
    except (RequestError, RunError) as error:
        return {"error": str(error), "code": 2 if isinstance(error, RequestError) else 1}

def late(p):  # rank 1 fails before its turn, while rank 0 has reached a later call
    def work():
        fails(RequestError("no such flag"), [1])
        return p.from_main(lambda: "folder")
    return p.together(work)

def tensors(p):
    mine = {
        "half": torch.arange(3).to(torch.bfloat16), "flag": torch.tensor([True, False]), "scalar": torch.tensor(2.5),
        "empty": torch.zeros(0, 4), "last": torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last),
    }
    shared = p.share_tensors(lambda: mine)
    return [[name, str(t.dtype), list(t.shape), t.double().sum().item()] for name, t in shared.items()]

torch.manual_seed(peers.rank)
found = [
    attempt(lambda p: p.together(lambda: fails(RequestError("no dataset"), [1]))),
    attempt(lambda p: p.together(lambda: fails(RunError("the Hub is away"), [0]))),
    attempt(lambda p: p.together(lambda: fails(FileNotFoundError(2, "No such file", "x"), [1]))),
    attempt(lambda p: p.together(lambda: fails(RequestError("wrong everywhere"), [0, 1]))),
    attempt(late),
    attempt(lambda p: p.from_main(lambda: ["only", p.rank])),
    attempt(lambda p: p.agree(lambda: 5, lambda _: {"--lr": 0.1, "--name": "a\\nb" if p.rank else None})),
    attempt(lambda p: p.agree(lambda: 5, lambda _: {"--lr": 0.1})),
    attempt(tensors),
]
print(json.dumps(found))
"""


@pytest.mark.slow
def test_an_error_in_one_process_is_raised_in_all_with_its_host(tmp_path: Path) -> None:
    main, other = wait(Hosts(tmp_path).start(["-c", PAIR], ["-c", PAIR]))
    assert (main.code, other.code) == (0, 0), main.err + other.err
    first, second = json.loads(main.out), json.loads(other.out)
    name = f"host {socket.gethostname()}"
    assert first[0] == {"error": f"{name} (rank 1): no dataset", "code": 2}
    assert second[0] == {"error": "no dataset", "code": 2}
    assert first[1] == {"error": "the Hub is away", "code": 1}
    assert second[1] == {"error": f"{name} (rank 0): the Hub is away", "code": 1}
    assert first[2]["code"] == second[2]["code"] == 1
    assert "No such file (x)" in first[2]["error"]
    assert first[3] == second[3] == {"error": "wrong everywhere", "code": 2}
    assert first[4] == {"error": f"{name} (rank 1): no such flag", "code": 2}
    assert second[4] == {"error": "no such flag", "code": 2}
    assert first[5] == second[5] == {"value": ["only", 0]}
    assert first[6] == second[6]
    assert f"{name} (rank 1) has --name a\\nb, but rank 0 has none;" in first[6]["error"]
    assert first[7] == second[7] == {"value": 5}
    assert first[8] == second[8]  # the values of the main process, although each process drew its own


def test_different_settings_or_versions_on_one_host_are_refused_on_all(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "resnext_hub", tmp_path / "other" / "resnext_hub")
    with open(tmp_path / "other" / "resnext_hub" / "runs" / "recipes.py", "a") as file:
        file.write("\n# edited on this host alone\n")
    flags = (*TINY, "--max-steps", 2, "--output-dir", "run")
    main, other = Hosts(tmp_path).train(
        (*flags, "--lr", 0.1), (*flags, "--lr", 0.5), PYTHONPATH=(str(ROOT), str(tmp_path / "other"))
    )
    assert (main.code, other.code) == (2, 2), main.err + other.err
    assert main.errors == other.errors
    assert len(main.errors) == 1
    assert f"host {socket.gethostname()} (rank 1) has --lr 0.5, but rank 0 has 0.1; resnext-hub " in main.errors[0]
    assert abs(main.at - other.at) < 10
    assert not list(tmp_path.rglob("run"))  # nothing was created


def test_a_missing_or_different_dataset_on_one_host_is_refused_on_all(tmp_path: Path) -> None:
    hosts = Hosts(tmp_path)
    for rank, folder in enumerate(hosts.folders):
        for name, shade in (("bus", 40), ("car" if rank == 0 else "tram", 200)):
            write_images(folder / "data" / name, 12, shade)
    flags = (*TINY, "--image-size", 32, "--batch-size", 8, "--max-steps", 2, "--output-dir", "run", "--dataset")
    main, other = hosts.train((*flags, "data"), (*flags, "data"))
    assert (main.code, other.code) == (2, 2), main.err + other.err
    assert "(rank 1) has class names bus, tram (2 in total, digest " in main.errors[0]
    assert "rank 0 has bus, car (2 in total, digest " in main.errors[0]
    assert main.errors == other.errors
    main, other = hosts.train((*flags, "data"), (*flags, "./elsewhere/data"))
    assert (main.code, other.code) == (2, 2), main.err + other.err
    assert main.errors == [
        other.errors[0].replace("error: ", f"error: host {socket.gethostname()} (rank 1): "),
    ]
    assert "elsewhere/data" in other.errors[0]
    assert abs(main.at - other.at) < 10


def test_different_numbers_of_processes_are_refused(tmp_path: Path) -> None:
    code = "from resnext_hub.cli.main import main; raise SystemExit(main(['train']))"
    main, other = wait(Hosts(tmp_path).start(["-c", code], ["-c", code], WORLD_SIZE=("2", "3")))
    assert (main.code, other.code) == (2, 2), main.err + other.err
    assert re.search(r"rank 1 \(host .+\) was started with WORLD_SIZE 3, but rank 0 was started with 2", main.errors[0])
    assert re.search(
        r"rank 0 \(host .+\) was started with WORLD_SIZE 2, but rank 1 was started with 3", other.errors[0]
    )


@pytest.fixture(scope="module")
def vehicles(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of classes, with an unreadable image in each split."""
    root = tmp_path_factory.mktemp("several-hosts") / "vehicles"
    for split, count in (("train", 24), ("validation", 8)):
        for name, shade in (("bus", 60), ("car", 130)):
            write_images(root / split / name, count, shade)
        (root / split / "bus" / "001.png").write_bytes(b"no image")
    return root


@pytest.mark.slow
def test_hosts_without_a_shared_disk_resume_bit_for_bit(tmp_path: Path, vehicles: Path) -> None:
    """One host is killed and loses its disk; the run resumes from the disk of the main process."""
    flags = (
        *TINY, "--dataset", "vehicles", "--image-size", 32, "--batch-size", 16, "--max-steps", 20, "--lr", 0.01,
        "--checkpoint-every", 5, "--ema", 0.9, "--max-bad-fraction", 0.5, "--log-samples", "--output-dir", "run",
    )  # fmt: skip
    alone, killed = Hosts(tmp_path / "alone"), Hosts(tmp_path / "killed")
    for folder in (*alone.folders, *killed.folders):
        shutil.copytree(vehicles, folder / "vehicles")
    for ended in alone.train(flags, flags):
        assert ended.code == 0, ended.err

    script = ROOT / "scripts" / "train.py"
    started = killed.start((script, *flags), (script, *flags))
    checkpoint = killed.folders[0] / "run" / "checkpoints" / "step-00000005"
    deadline = time.monotonic() + LIMIT
    while not checkpoint.is_dir() and time.monotonic() < deadline and started[0].poll() is None:
        time.sleep(0.01)
    started[1].kill()
    main, _ = wait(started)
    assert main.code == 1, main.err
    assert "process 0 lost the connection to another process of the run" in main.errors[0]
    shutil.rmtree(killed.folders[1] / "run")
    main, other = killed.train(flags, flags)
    assert (main.code, other.code) == (0, 0), main.err + other.err
    assert "resuming from step-" in main.err
    assert (main.out.count("model folder:"), other.out) == (1, "")

    assert sorted(path.name for path in (killed.folders[1] / "run").iterdir()) == ["samples-1.jsonl"]
    for name in ("model/model.safetensors", "checkpoints/step-00000020/ema.safetensors"):
        ours, theirs = (load_file(hosts.folders[0] / "run" / name) for hosts in (killed, alone))
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    record = RunRecord.load(killed.folders[0] / "run" / "record.json")
    assert (record.processes, record.resumes) == (2, 1)
    assert [image.split for image in record.unreadable_images] == ["evaluation", "training"]

    before = (killed.folders[0] / "run" / "record.json").read_bytes()
    main, other = killed.train(flags, flags)  # the second host has no files of the finished run
    assert (main.code, other.code) == (0, 0), main.err + other.err
    assert "already finished; nothing was computed" in main.out
    assert (killed.folders[0] / "run" / "record.json").read_bytes() == before


@pytest.fixture
def namespaces() -> Iterator[list[str]]:
    """Two connected network namespaces, which stand in for two hosts."""
    names = [f"rh{os.getpid()}{side}" for side in "ab"]
    cable = [f"v{os.getpid()}{side}" for side in "ab"]
    made = [["ip", "netns", "add", name] for name in names]
    made.append(["ip", "link", "add", cable[0], "type", "veth", "peer", "name", cable[1]])
    for side, (name, end) in enumerate(zip(names, cable, strict=True)):
        inside = ["ip", "-n", name]
        made.append(["ip", "link", "set", end, "netns", name, "name", "eth0"])
        made += [[*inside, "addr", "add", f"10.213.77.{side + 1}/24", "dev", "eth0"]]
        made += [[*inside, "link", "set", link, "up"] for link in ("lo", "eth0")]
    try:
        if shutil.which("ip") is None or shutil.which("unshare") is None:
            pytest.skip("ip and unshare are not installed")
        for words in made:
            if (done := subprocess.run(words, capture_output=True, text=True, check=False)).returncode:
                pytest.skip(f"no network namespaces here: {' '.join(words)}: {done.stderr.strip()}")
        yield names
    finally:
        for name in names:
            if shutil.which("ip"):
                subprocess.run(["ip", "netns", "delete", name], capture_output=True, check=False)


@pytest.mark.slow
def test_torchrun_on_two_hosts_refuses_different_settings(tmp_path: Path, namespaces: list[str]) -> None:
    started = []
    for rank, (name, lr) in enumerate(zip(namespaces, (0.1, 0.5), strict=True)):
        launcher = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--node_rank", str(rank)]
        launcher += ["--nproc_per_node", "1", "--master_addr", "10.213.77.1", "--master_port", "29511"]
        train = [str(ROOT / "scripts" / "train.py"), *TINY, "--lr", str(lr), "--output-dir", str(tmp_path / name)]
        named = ["unshare", "--uts", "sh", "-c", f'hostname host-{rank} && exec "$@"', "sh"]
        started.append(
            subprocess.Popen(
                ["ip", "netns", "exec", name, *named, *launcher, *train],
                cwd=tmp_path,
                env=os.environ | {"GLOO_SOCKET_IFNAME": "eth0"},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    for host in wait(started):
        assert host.code != 0
        assert len(host.errors) == 1, host.err
        assert "error: host host-1 (rank 1) has --lr 0.5, but rank 0 has 0.1; start every process" in host.errors[0]


SILENT = """
import sys, time
from pathlib import Path
from resnext_hub.processes import heartbeat, peers as agreement
heartbeat.BEAT, heartbeat.SILENCE = 0.5, 5.0
peers = agreement.join()
with heartbeat.heartbeat(peers):
    time.sleep(2)  # both have sent heartbeats
    peers.gather("together")
    Path(sys.argv[1], f"ready-{peers.rank}").touch()
    if peers.rank == 0:
        peers.gather("alone")
    time.sleep(600)
"""


def test_a_host_that_drops_off_the_network_is_detected_on_both_sides(tmp_path: Path, namespaces: list[str]) -> None:
    from resnext_hub.processes import heartbeat

    assert heartbeat.SILENCE + 2 * heartbeat.BEAT <= 60
    place = {"WORLD_SIZE": "2", "MASTER_ADDR": "10.213.77.1", "MASTER_PORT": "29512", "GLOO_SOCKET_IFNAME": "eth0"}
    started = [
        subprocess.Popen(
            ["ip", "netns", "exec", name, sys.executable, "-c", SILENT, str(tmp_path)],
            env=os.environ | place | {"RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank, name in enumerate(namespaces)
    ]
    deadline = time.monotonic() + LIMIT
    while not all((tmp_path / f"ready-{rank}").exists() for rank in (0, 1)) and time.monotonic() < deadline:
        assert all(process.poll() is None for process in started), wait(started)
        time.sleep(0.05)
    cut = time.monotonic()
    subprocess.run(["ip", "-n", namespaces[1], "link", "set", "eth0", "down"], check=True)
    main, other = wait(started)
    assert (main.code, other.code) == (1, 1)
    assert "(rank 1) has not responded for 5 s, so the run stops" in main.err
    assert "(rank 0) has not responded for 5 s, so the run stops" in other.err
    assert max(main.at, other.at) - cut < 60


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE is two; expected a whole number"),
        ({"WORLD_SIZE": "2", "RANK": "-1"}, "RANK is -1; expected a whole number"),
        ({"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "\x1b[1m"}, r"LOCAL_RANK is \x1b[1m; expected"),
        ({"WORLD_SIZE": "2", "RANK": "2", "MASTER_ADDR": "a", "MASTER_PORT": "1"}, "RANK is 2 with WORLD_SIZE 2"),
        ({"WORLD_SIZE": "0"}, "RANK is 0 with WORLD_SIZE 0"),
        ({"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"}, "WORLD_SIZE is not set, so each process would train"),
        ({"WORLD_SIZE": "2", "RANK": "0"}, "MASTER_ADDR not set"),
        ({"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "a", "MASTER_PORT": "0"}, "MASTER_PORT 0; expected"),
        ({"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "a", "MASTER_PORT": "99999"}, "MASTER_PORT 99999"),
    ],
)
def test_inconsistent_launcher_variables_are_refused(
    command: Callable[..., tuple[int, str, str]],
    monkeypatch: pytest.MonkeyPatch,
    variables: dict[str, str],
    message: str,
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    code, _, err = command("train")
    assert code == 2
    assert err.count("\n") == 1 or "LOCAL_RANK" in variables
    with pytest.raises(RequestError) as refused:
        Place.read()
    assert message in str(refused.value)


@pytest.mark.slow
def test_accelerate_launch_with_several_cpu_processes_is_refused(tmp_path: Path) -> None:
    words = ["-m", "accelerate.commands.launch", "--cpu", "--num_processes", 2, ROOT / "scripts" / "train.py"]
    done = run_process(*words, *TINY, "--max-steps", 2, "--output-dir", tmp_path / "run")
    assert done.returncode != 0
    assert "start several processes with torchrun" in done.stderr
    assert not (tmp_path / "run").exists()


BLOCKED = """
import time
from datetime import timedelta
from pathlib import Path
from resnext_hub.processes import peers as agreement
from resnext_hub.training import stop
stop.GRACE = 0.5
peers = agreement.join()
with stop.StopSignal(peers.size, timedelta(hours=1)) as signal:
    Path("ready").touch()
    if peers.rank == 1:
        time.sleep(600)
    signal.agreed()
"""


def test_a_process_that_waits_for_a_lost_one_ends_on_sigterm(tmp_path: Path) -> None:
    assert stop.GRACE <= 30.0  # launchers then send SIGKILL
    hosts = Hosts(tmp_path)
    started = hosts.start(["-c", BLOCKED], ["-c", BLOCKED])
    deadline = time.monotonic() + LIMIT
    while not all((folder / "ready").exists() for folder in hosts.folders) and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.5)  # until rank 0 waits
    started[0].terminate()
    try:
        _, err = started[0].communicate(timeout=30)
    finally:
        for process in started:
            process.kill()
        started[1].communicate()
    assert started[0].returncode == 143
    assert "stopped by SIGTERM while waiting for another process of the run" in err

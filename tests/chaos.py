"""Kill training runs at random moments until they end, and compare the result with a run that was left alone.

    python tests/chaos.py --kills 20 --processes 1 2 3
    python tests/chaos.py --kills 20 --processes 1 2 4 --elastic 4

Each run is killed in another way at each of its moments: all its processes, the launcher alone, or one process of
several; by SIGKILL, or by SIGTERM as a preempted machine is. Moments are spread over the whole run, start and
checkpoints included. After each kill the same command is typed again. The table says what was killed, and whether
weights, moving average, metrics and logged pixels came out the same to the bit. With --elastic there is one run: it
goes on with another number of processes after each kill, and is compared with a run of the first number of them.
"""

import argparse
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file
from support import warm_start

ROOT = Path(__file__).resolve().parent.parent

FLAGS = (
    "--model", "test_resnet", "--mixed-precision", "no", "--warmup-epochs", "0", "--lr", "0.01", "--batch-size", "48",
    "--checkpoint-every", "9", "--mixup", "0.2", "--cutmix", "1", "--ema", "0.99", "--drop-rate", "0.1",
    "--log-samples", "--threads", "1",
)  # fmt: skip
"""A tiny network with everything on that a resume could get wrong."""

CLOCK = ("images_per_second", "data_wait")
"""What two runs cannot have in common."""


class Training:
    """A run, whose command is repeated until it finishes."""

    def __init__(self, folder: Path, processes: int, steps: int, flags: Sequence[str] = FLAGS) -> None:
        self.folder = folder
        self.processes = processes
        self.train = ["scripts/train.py", *flags, "--max-steps", str(steps), "--output-dir", str(folder)]
        self.errors = folder.with_name(f"{folder.name}.errors")

    @property
    def command(self) -> list[str]:
        """The command."""
        launcher = ["-m", "torch.distributed.run", "--nproc_per_node", str(self.processes), "--master_port", "0"]
        launcher += ["--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0"]
        return [sys.executable, *(launcher if self.processes > 1 else []), *self.train]

    def start(self) -> "subprocess.Popen[bytes]":
        """Start the command in its own process group, as a shell does."""
        environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
        with open(self.errors, "ab") as errors:
            return warm_start.Popen(
                self.command,
                cwd=ROOT,
                env=environment,
                stdout=subprocess.DEVNULL,
                stderr=errors,
                start_new_session=True,
            )

    def finish(self) -> float:
        """Run to the end; return the seconds that it took."""
        begin = time.monotonic()
        run = self.start()
        assert run.wait(timeout=600) == 0, self.errors.read_text()[-3000:]
        return time.monotonic() - begin

    def step(self) -> int:
        """Return the steps that the main process has logged."""
        path = self.folder / "samples-0.jsonl"
        return path.read_bytes().count(b"\n") if path.is_file() else 0

    def members(self) -> list[int]:
        """Return the processes of this run that live, launcher and orphans included; each has the folder's name."""
        found = []
        for entry in Path("/proc").iterdir():
            with contextlib.suppress(OSError):
                if entry.name.isdigit() and os.fsencode(self.folder) in (entry / "cmdline").read_bytes():
                    found.append(int(entry.name))
        return sorted(found)

    def strike(self, run: "subprocess.Popen[bytes]", how: str, luck: random.Random) -> None:
        """Kill the run in one of the ways, and wait until nothing of it is left."""
        number = signal.SIGTERM if how.endswith("SIGTERM") else signal.SIGKILL
        if how.startswith("all"):
            doomed = self.members()
        elif how.startswith("launcher"):
            doomed = [run.pid]
        else:
            doomed = [luck.choice([pid for pid in self.members() if pid != run.pid] or [run.pid])]
        for pid in doomed:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
        run.wait(timeout=60)
        deadline = time.monotonic() + 60
        while self.members() and time.monotonic() < deadline:
            if how == "launcher SIGKILL":  # its orphans work on, until the machine takes them away
                time.sleep(luck.uniform(0.0, 0.5))
                for pid in self.members():
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.05)
        assert not self.members(), f"{how} left processes behind"


def ways(processes: int) -> list[str]:
    """Return the ways to kill a run."""
    if processes == 1:
        return ["all SIGKILL", "all SIGTERM"]
    return ["all SIGKILL", "launcher SIGTERM", "launcher SIGKILL", "one SIGKILL", "all SIGTERM"]


def without_clock(path: Path) -> list[dict[str, object]]:
    """Return the lines of a log without what depends on the clock."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in CLOCK} for line in lines]


def differences(one: Path, other: Path, processes: int = 0) -> list[str]:
    """Return the names of everything that differs between two finished runs, bit for bit.

    Args:
        one: Their folders.
        other: The second one.
        processes: How many processes each had, to compare the samples of each as well.
    """
    found = []
    last = sorted((one / "checkpoints").iterdir())[-1].name
    for name in (
        "model/model.safetensors",
        *(f"checkpoints/{last}/{n}.safetensors" for n in ("model", "ema", "optimizer")),
    ):
        a, b = load_file(one / name), load_file(other / name)
        if a.keys() != b.keys() or not all(torch.equal(a[key], b[key]) for key in a):
            found.append(name)
    for name in ("metrics.jsonl", *(f"samples-{p}.jsonl" for p in range(processes))):
        if without_clock(one / name) != without_clock(other / name):
            found.append(name)
    return found


def torment(
    folder: Path, processes: int | Sequence[int], kills: int, steps: int, seed: int, elastic: int = 0
) -> tuple[list[tuple[str, int]], list[str]]:
    """Compare a run that is killed often with one that is left alone.

    Args:
        folder: Where the two runs go.
        processes: How many processes each has; several numbers are those of the killed one from kill to kill.
        kills: How often the one is killed.
        steps: Optimizer steps of a run.
        seed: Seed of moments and ways.
        elastic: How many virtual processes each has, if the number of processes changes.

    Returns:
        What was done (way, step), and what came out different.
    """
    luck = random.Random(seed)
    counts = [processes] if isinstance(processes, int) else list(processes)
    flags = (*FLAGS, "--drop-path", "0.2", "--elastic", str(elastic)) if elastic else FLAGS
    alone = Training(folder / f"alone-{counts[0]}", counts[0], steps, flags)
    alone.finish()
    killed = Training(folder / f"killed-{counts[0]}", counts[0], steps, flags)
    done: list[tuple[str, int]] = []
    while len(done) < kills:
        killed.processes = counts[len(done) % len(counts)]
        how = ways(killed.processes)[len(done) % len(ways(killed.processes))]
        # moments go by progress, so that every part of the run is hit; the last bit by the clock, down to the instant
        target = round(steps * len(done) / kills) + luck.randint(0, 3)
        before = killed.step()
        run = killed.start()
        deadline = time.monotonic() + 120
        fresh = False
        while run.poll() is None and time.monotonic() < deadline:
            now = killed.step()
            fresh = fresh or now != before
            if (fresh and now >= target) or (target == 0 and luck.random() < 0.01):
                break
            time.sleep(0.002)
        time.sleep(luck.uniform(0.0, 0.2))
        if run.poll() is not None:
            assert run.returncode == 0, killed.errors.read_text()[-3000:]
            break
        killed.strike(run, how, luck)
        done.append((how, killed.step()))
    killed.processes = counts[len(done) % len(counts)]
    killed.finish()
    return done, differences(alone.folder, killed.folder, 0 if elastic else counts[0])


def main() -> int:
    """Run the long form, and print its table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--elastic", type=int, default=0)
    options = parser.parse_args()
    wrong = 0
    print("| processes | killed, at step | different from the run left alone |\n|---|---|---|")
    with tempfile.TemporaryDirectory() as scratch:
        for processes in [options.processes] if options.elastic else options.processes:
            done, different = torment(
                Path(scratch), processes, options.kills, options.steps, options.seed, options.elastic
            )
            kills = ", ".join(f"{how} {step}" for how, step in done)
            print(f"| {processes} | {len(done)}: {kills} | {', '.join(different) or 'nothing'} |", flush=True)
            wrong += bool(different)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())

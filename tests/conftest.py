"""Tests run offline, on the CPU, with caches of their own."""

import gc
import os
import tempfile

os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "HF_HOME": tempfile.mkdtemp(prefix="resnext-hub-tests-"),
    "RESNEXT_HUB_CACHE": tempfile.mkdtemp(prefix="resnext-hub-tests-"),
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "ACCELERATE_USE_CPU": "true",
    "OMP_WAIT_POLICY": "passive",  # threads that wait for others would otherwise take the cores from other tests
}
for _variable in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "ACCELERATE_MIXED_PRECISION", "HF_TOKEN", "HF_ENDPOINT"):
    os.environ.pop(_variable, None)

import atexit
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from support.processes import TINY, run_process, write_images

import resnext_hub  # noqa: F401 - registers the variants
from resnext_hub.cli.main import main

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)  # the tests of another worker take the other cores

for _variable in ("HF_HOME", "RESNEXT_HUB_CACHE"):
    atexit.register(shutil.rmtree, os.environ[_variable], ignore_errors=True)


@pytest.fixture(autouse=True)
def _fresh_process_state() -> Iterator[None]:
    """Restore what a training run in this process sets for the whole process."""
    threads, environment = torch.get_num_threads(), dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(environment)
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    torch.use_deterministic_algorithms(False)
    torch.set_num_threads(threads)


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Run a command in this process; return its exit code, output and errors."""

    def run(*arguments: object) -> tuple[int, str, str]:
        code = main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


@pytest.fixture
def folder_of_classes(tmp_path: Path) -> Path:
    """A folder with the classes bus, car and train, of 12, 10 and 8 images."""
    root = tmp_path / "vehicles"
    for name, count, shade in (("bus", 12, 40), ("car", 10, 120), ("train", 8, 210)):
        write_images(root / name, count, shade)
    return root


@pytest.fixture(scope="session")
def vehicles_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run on folders of images: `vehicles/validation` beside it has 36, and one that is broken."""
    root = tmp_path_factory.mktemp("vehicles-run")
    for split, count, darker in (("train", 20, 0), ("validation", 12, 7)):
        for name, shade in (("bus", 60), ("car", 110), ("train", 160)):
            write_images(root / "vehicles" / split / name, count, shade - darker)
    (root / "vehicles" / "validation" / "car" / "005-broken.png").write_bytes(b"no image")
    where: tuple[object, ...] = ("--dataset", root / "vehicles")
    flags = (*TINY, *where, "--image-size", 32, "--max-steps", 24, "--lr", 0.01, "--threads", 1)
    flags += ("--batch-size", 20, "--max-bad-fraction", 0.5, "--output-dir", root / "run")
    done = run_process("scripts/train.py", *flags)
    assert done.returncode == 0, done.stderr
    return root / "run"


@pytest.fixture(scope="session")
def _digits_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("digits-run") / "published"
    done = run_process("scripts/train.py", *TINY, "--max-steps", 30, "--lr", 0.01, "--output-dir", folder)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def finished(_digits_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of 30 steps on the digits, which the tests of a module may publish."""
    return Path(shutil.copytree(_digits_run, tmp_path_factory.mktemp("runs") / "published"))


@pytest.fixture(autouse=True, scope="module")
def _exempt_imports_from_garbage_collection() -> None:
    """Freeze what exists before a module: the collection after each test would otherwise scan all imported libraries.

    That takes 0.2 s, which is a fifth of the time of the whole suite.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _keep_signal_stack() -> Iterator[None]:
    """Restore the stack of signal handlers: destroyed OpenVINO cores leave a freed one, and SIGCHLD crashes."""
    from resnext_hub.kernels.openvino import keep_signal_stack

    with keep_signal_stack():
        yield

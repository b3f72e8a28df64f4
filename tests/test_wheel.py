"""The package as people install it: built, installed outside the checkout, trained from."""

import os
import subprocess
import sys
from pathlib import Path

from pytest import mark
from support.processes import ROOT, TINY

from resnext_hub.record import RunRecord


def run(*words: object, cwd: Path, **options: object) -> str:
    done = subprocess.run(
        [sys.executable, *map(str, words)], cwd=cwd, capture_output=True, text=True, check=False, **options
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@mark.slow
def test_the_wheel_trains_two_steps_outside_the_checkout(tmp_path: Path) -> None:
    run("-m", "build", "--wheel", "--no-isolation", "--outdir", tmp_path / "dist", ROOT, cwd=tmp_path)
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    site = tmp_path / "site"
    run("-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", site, wheel, cwd=tmp_path)
    environment = os.environ | {"PYTHONPATH": str(site)}
    where = run("-c", "import resnext_hub; print(resnext_hub.__file__)", cwd=tmp_path, env=environment)
    assert where.startswith(str(site))
    assert (site / "resnext_hub" / "py.typed").is_file()
    words = ("-m", "resnext_hub", "train", *TINY, "--max-steps", 2)
    out = run(*words, cwd=tmp_path, env=environment)
    assert "model folder: runs/digits-test_resnet/model" in out
    assert RunRecord.load(tmp_path / "runs" / "digits-test_resnet" / "record.json").steps == 2

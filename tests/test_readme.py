"""What the README shows is run."""

import re
import shlex
from collections.abc import Iterator

import timm
import torch
from pytest import fixture, mark
from safetensors.torch import save
from support.loopback_hub import LoopbackHub, serve
from support.processes import ROOT, run_process

from resnext_hub.cli.main import build_parser, main
from resnext_hub.models import VARIANTS

README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", README, re.DOTALL)
COMMANDS = [line for kind, text in BLOCKS if kind == "bash" for line in text.splitlines()]


@fixture
def hub() -> Iterator[LoopbackHub]:
    with serve() as server:
        yield server


def test_the_python_block_runs_against_a_hub_that_has_timms_weights(hub: LoopbackHub, tmp_path) -> None:
    torch.manual_seed(0)
    model = timm.create_model("resnext50_32x4d")
    files = {"model.safetensors": save(model.state_dict(), metadata={"format": "pt"})}
    hub.create("models", "timm/resnext50_32x4d.a1h_in1k").commit("weights", files)
    (block,) = [text for kind, text in BLOCKS if kind == "python"]
    expected = float(model.conv1.weight.detach().double().sum())
    check = f"assert float(model.conv1.weight.detach().double().sum()) == {expected!r}"
    done = run_process("-c", block + check, HF_HOME=str(tmp_path), **hub.environment())
    assert done.returncode == 0, done.stderr


@mark.parametrize("line", [line for line in COMMANDS if not line.endswith("pytest")])
def test_every_command_is_one_that_the_command_line_takes(line: str) -> None:
    words = shlex.split(line.rpartition(" && ")[2])
    if words[0] != "resnext-hub":
        script = next(word for word in words if word.startswith("scripts/"))
        assert (ROOT / script).is_file()
        words = words[words.index(script) :]
        words[0] = script.removeprefix("scripts/").removesuffix(".py")
    else:
        del words[0]
    build_parser().parse_args(words)


@mark.parametrize("command", re.findall(r"`resnext-hub (info[^`]*)`", README))
def test_every_info_command_prints_a_table(command: str, capsys) -> None:
    assert main(shlex.split(command)) == 0
    assert "M parameters" in capsys.readouterr().out


def test_the_two_lines_of_a_newcomer_are_there() -> None:
    assert 'pip install -e ".[train]" && accelerate launch scripts/train.py' in COMMANDS
    assert 'pip install -e ".[dev]" && pytest' in COMMANDS


def test_the_number_of_variants_is_that_of_the_table() -> None:
    assert f"registers {len(VARIANTS)} variants" in README


@mark.slow
def test_what_the_page_on_speed_shows_runs() -> None:
    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "speed.md").read_text(), re.DOTALL)
    # smaller images, and eager: the same lines in less time
    code = block.replace("224, 224", "64, 64").replace(
        "optimize(model, images)", "optimize(model, images, compile=False)"
    )
    done = run_process("-c", code)
    assert done.returncode == 0, done.stderr
    speedup, error = map(float, done.stdout.split())
    assert speedup > 0
    assert error < 0.05

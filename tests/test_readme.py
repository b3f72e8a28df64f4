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
    network = timm.create_model("resnext50_32x4d")
    files = {"model.safetensors": save(network.state_dict(), metadata={"format": "pt"})}
    hub.create("models", "timm/resnext50_32x4d.a1h_in1k").commit("weights", files)
    (block,) = [text for kind, text in BLOCKS if kind == "python"]
    expected = float(network.conv1.weight.detach().double().sum())
    check = f"assert float(model.conv1.weight.detach().double().sum()) == {expected!r}"
    done = run_process("-c", block + check, HF_HOME=str(tmp_path), **hub.environment())
    assert done.returncode == 0, done.stderr


@mark.parametrize("line", [line for line in COMMANDS if "scripts/" in line])
def test_every_command_is_one_that_the_command_line_takes(line: str) -> None:
    words = shlex.split(line.rpartition(" && ")[2])
    script = next(word for word in words if word.startswith("scripts/"))
    assert (ROOT / script).is_file()
    name = script.removeprefix("scripts/").removesuffix(".py")
    build_parser().parse_args([name, *words[words.index(script) + 1 :]])


@mark.parametrize("command", re.findall(r"`resnext-hub (info[^`]*)`", README))
def test_every_info_command_prints_a_table(command: str, capsys) -> None:
    assert main(shlex.split(command)) == 0
    assert "M parameters" in capsys.readouterr().out


def test_the_two_lines_of_a_newcomer_are_there() -> None:
    assert 'pip install -e ".[train]" && accelerate launch scripts/train.py' in COMMANDS
    assert 'pip install -e ".[dev]" && pytest' in COMMANDS


def test_the_table_lists_the_50_layer_variants_with_template_and_parameters() -> None:
    rows = re.findall(r"^\| `(\w+)` \| (\w+) \| ([\d.]+) M \|", README, re.MULTILINE)
    assert [name for name, _, _ in rows] == [name for name, v in VARIANTS.items() if v.depth == 50]
    assert f"And {len(VARIANTS) - len(rows)} more" in README
    for name, template, parameters in rows:
        assert VARIANTS[name].template == template
        with torch.device("meta"):
            network = timm.create_model(name)
        assert f"{sum(p.numel() for p in network.parameters()) / 1e6:.1f}" == parameters


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

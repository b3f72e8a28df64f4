"""Variant cards follow from their facts, and the facts from formulas and timm's registry."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import timm
import torch
from PIL import Image
from pytest import MonkeyPatch, mark, skip
from safetensors.torch import save_file
from support.processes import ROOT

from resnext_hub.cards.variant_card import render_variant_card, variant_facts, variants_with_weights
from resnext_hub.models import VARIANTS

CARDS = ROOT / "model_cards"
NAMES = [variant.name for variant in variants_with_weights()]


def test_exactly_the_variants_with_released_weights_have_cards() -> None:
    assert sorted(p.name for p in CARDS.iterdir()) == sorted(
        f"{name}.{kind}" for name in NAMES for kind in ("json", "md")
    )


@mark.parametrize("name", NAMES)
def test_a_card_is_rendered_from_its_facts(name: str) -> None:
    facts = json.loads((CARDS / f"{name}.json").read_text())
    assert (CARDS / f"{name}.md").read_text() == render_variant_card(facts)


@mark.parametrize("name", NAMES)
def test_the_facts_match_formulas_and_registry(name: str) -> None:
    facts = json.loads((CARDS / f"{name}.json").read_text())
    if facts["timm_version"] != timm.__version__:
        skip("another version of timm may have released other weights")
    assert facts == variant_facts(VARIANTS[name])


def test_info_writes_the_cards(command: Callable[..., tuple[int, str, str]], tmp_path: Path) -> None:
    code, out, _ = command("info", "--write-cards", tmp_path)
    assert code == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(p.name for p in CARDS.iterdir())
    assert "resnext_g32.md" in out


@mark.slow
def test_the_snippets_of_a_card_run(tmp_path: Path, monkeypatch: MonkeyPatch) -> None:
    name = "resnext_g32"
    text = (CARDS / f"{name}.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(blocks) == 3
    save_file(timm.create_model(name).state_dict(), tmp_path / "model.safetensors")
    Image.new("RGB", (320, 240), "red").save(tmp_path / "image.jpg")
    monkeypatch.chdir(tmp_path)
    overlay = f'pretrained_cfg_overlay={{"file": "{tmp_path / "model.safetensors"}", "hf_hub_id": None}}'
    scope: dict[str, object] = {}
    for block in blocks:  # load the weights from a file, since tests are offline
        exec(block.replace("pretrained=True", f"pretrained=True, {overlay}"), scope)
    assert scope["top5_classes"].shape == (1, 5)
    assert scope["embedding"].shape == (1, 2048)
    size = timm.create_model(name).pretrained_cfg["input_size"][-1]
    maps = timm.create_model(name, features_only=True)(torch.randn(1, 3, size, size))
    assert "# " + ", ".join(str(tuple(m.shape)) for m in maps) in text

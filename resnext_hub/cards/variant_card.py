"""Cards of the variants with released weights: facts as JSON, and Markdown rendered from them alone."""

import json
from importlib import resources
from pathlib import Path
from typing import Any

import timm
from timm.models import get_pretrained_cfg, list_pretrained

from resnext_hub.files import write_atomic, write_json
from resnext_hub.models.complexity import PAPER_ERROR, complexity_of
from resnext_hub.models.resnext import STAGE_WIDTHS, VARIANTS, Bottleneck, Variant, stock_architecture

_WEIGHT_FACTS = ("hf_hub_id", "license", "origin_url", "paper_ids", "input_size", "test_input_size")


def variants_with_weights() -> list[Variant]:
    """Return the variants for which timm has released weights."""
    return [variant for name, variant in VARIANTS.items() if list_pretrained(f"{name}.*")]


def variant_facts(variant: Variant) -> dict[str, Any]:
    """Return the facts of a variant's card: complexity by formula, and weights from timm's registry."""
    size = 224
    cost = complexity_of(variant, size)
    stock = stock_architecture(variant)
    assert stock is not None
    default = get_pretrained_cfg(variant.name)
    assert default is not None
    tags = [name.partition(".")[2] for name in list_pretrained(f"{variant.name}.*")]
    tags.sort(key=lambda tag: (tag != default.tag, tag))
    weights = []
    for tag in tags:
        cfg = get_pretrained_cfg(f"{variant.name}.{tag}")
        assert cfg is not None
        weights.append({"tag": tag, **{key: getattr(cfg, key) for key in _WEIGHT_FACTS}})
    shapes = [(64, size // 2)] + [
        (width * Bottleneck.expansion, size // 4 // 2**i) for i, width in enumerate(STAGE_WIDTHS)
    ]
    facts = {
        "format_version": 1,
        "timm_version": timm.__version__,
        "name": variant.name,
        "stock": stock.name,
        "layers": variant.depth,
        "cardinality": variant.cardinality,
        "base_width": variant.base_width,
        "template": variant.template,
        "image_size": size,
        "parameters": cost.parameters,
        "macs": cost.macs,
        "activations": cost.activations,
        "paper_error": PAPER_ERROR.get(variant.name),
        "num_features": STAGE_WIDTHS[-1] * Bottleneck.expansion,
        "feature_shapes": [f"(1, {channels}, {side}, {side})" for channels, side in shapes],
        "weights": weights,
    }
    return dict(json.loads(json.dumps(facts)))  # as it is read back: lists, not tuples


def render_variant_card(facts: dict[str, Any]) -> str:
    """Return the card of a variant as Markdown."""
    import jinja2

    template = resources.files("resnext_hub.cards").joinpath("variant_card.md.jinja").read_text("utf-8")
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True, autoescape=False)
    return environment.from_string(template).render(card=facts)


def write_variant_cards(folder: Path) -> list[Path]:
    """Write `NAME.json` and `NAME.md` for every variant with released weights; return their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for variant in variants_with_weights():
        facts = variant_facts(variant)
        write_json(folder / f"{variant.name}.json", facts)
        write_atomic(folder / f"{variant.name}.md", render_variant_card(facts))
        paths += [folder / f"{variant.name}.json", folder / f"{variant.name}.md"]
    return paths

"""Every sentence of a model card follows from the record, and text from data is inert."""

import ast
import dataclasses
import re
import time

import yaml
from pytest import mark
from support.records import a_record

from resnext_hub.cards.model_card import MOST_CLASSES, render_card
from resnext_hub.facts import BaseModelFacts, DatasetFacts, SampleFacts
from resnext_hub.hub.publish import CARD_BYTES

HOSTILE = (
    "<script>alert(1)</script>",
    "![x](http://evil.example/x.png)",
    "[x](javascript:alert(1))",
    "a|b",
    "a\r\n# b",
    "``` \n```",
    "`",
    '"); import os; os.system("x") #',
    "'; rm -rf ~; '",
    "---",
    "\x1b[31mred",
    "\u202egpj.exe",
    "{{ 7*7 }}{% raw %}",
    "https://evil.example",
    "$(x) ${y} $z$",
    "&amp; &lt;",
    "-->",
    "<!-- resnext-hub card end -->",
    "\udcff",
)


def visible(card: str) -> str:
    """Return a card's Markdown without code and comments: the part where all text from data must be escaped."""
    body = card.split("---\n", 2)[2]
    return re.sub(r"```.*?```|`[^`\n]+`|<!-- resnext-hub card .*?-->", "", body, flags=re.DOTALL)


@mark.parametrize("text", HOSTILE)
def test_text_from_data_is_escaped(text: str) -> None:
    names = [text, "b", "c"]
    record = a_record(
        names,
        name=text,
        sample=SampleFacts(index=0, label=text, output=[(text, 0.9)]),
        base_model=BaseModelFacts(id=text, hub_id=None, license=text),
        command=f"accelerate launch scripts/train.py --dataset {text!r}",
        unreadable_images=[{"split": "training", "image": text, "reason": text}],
        versions={"torch": text},
    )
    dataset = dataclasses.replace(record.dataset, id=text, train_split=text, eval_split=f"{text}2", revision=text)
    config = record.config | {"dataset": text, "model": text}
    card = render_card(dataclasses.replace(record, dataset=dataset, config=config))
    card.encode()
    plain = render_card(a_record())
    shown = visible(card)
    for harmful in ("<script", "\r", "\x1b", "\u202e", "\n---\n", "https://evil"):
        assert harmful not in shown, harmful
    assert re.findall(r"(?<!\\)\]\(", shown) == re.findall(r"(?<!\\)\]\(", visible(plain))
    assert not [word for word in re.findall(r"<[!/a-z][^>]*>", shown) if word not in visible(plain)]
    # the same numbers of code fences, headings and table columns as in a card of harmless names
    for pattern in (r"^```", r"^#+ ", r"^!\["):
        assert len(re.findall(pattern, card, re.MULTILINE)) == len(re.findall(pattern, plain, re.MULTILINE)), pattern
    for line in card.splitlines():
        if line.startswith("| ") and "b" in line:
            assert line.count("|") - line.count("\\|") in (3, 6, 9), line
    metadata = yaml.safe_load(card.split("---\n", 2)[1])
    assert metadata["model-index"][0]["results"][0]["task"]["type"] == "image-classification"
    for snippet in re.findall(r"^```python\n(.*?)^```", card, re.DOTALL | re.MULTILINE):
        assert not any(isinstance(n, ast.Attribute) and n.attr == "system" for n in ast.walk(ast.parse(snippet)))


def many(recalls: list[tuple[int, int]]) -> str:
    """Render a card for `(correct, count)` evaluation images per class."""
    classes = len(recalls)
    rows = [
        [(n, correct)] * (correct > 0) + [((n + 1) % classes, count - correct)] * (count > correct)
        for n, (correct, count) in enumerate(recalls)
    ]
    names = [f"class {n}" for n in range(classes)]
    return render_card(a_record(names, rows))


def test_the_recall_of_unlisted_classes_is_stated() -> None:
    card = many([(0, 2)] * 498 + [(1, 2)] * 2)
    assert f"The other {500 - MOST_CLASSES} measured classes have a recall of 0.00 % or higher" in card
    card = many([(0, 2)] * MOST_CLASSES + [(1, 2)] * 20)
    assert "The other 20 measured classes have a recall of 50.00 % or higher" in card
    card = many([(1, 2)] * 20 + [(0, 0)] * 30)
    assert "measured classes have" not in card


def test_classes_without_evaluation_images_are_not_measured() -> None:
    card = many([(3, 3), (2, 2), (0, 0), (0, 0)])
    assert "**2 of them have no evaluation images and were not measured: class 2, class 3.**" in card
    assert "| class 2 | 0 | 0 | not measured |  |" in card
    assert "Macro averages include only the measured classes." in card
    assert "Macro-F1 (2 of 4 classes measured)" in card.split("---\n", 2)[1]
    whole = many([(3, 3), (2, 2)])
    assert "not measured:" not in whole
    assert "name: Macro-F1\n" in whole


def test_a_misclassified_sample_is_called_incorrect() -> None:
    record = a_record(sample=SampleFacts(index=4, label="bus", output=[("car", 0.6), ("bus", 0.4)]))
    assert "(class bus) is classified incorrectly: car (60.00 %), bus (40.00 %)." in render_card(record)
    record = a_record(sample=SampleFacts(index=4, label="bus", output=[("bus", 0.6)]))
    assert "(class bus) is classified correctly: bus (60.00 %)." in render_card(record)


def test_an_evaluation_on_the_training_split_is_called_so() -> None:
    record = a_record()
    assert "on held-out images" in render_card(record)
    dataset: DatasetFacts = dataclasses.replace(record.dataset, eval_split="train")
    card = render_card(dataclasses.replace(record, dataset=dataset))
    assert "held" not in visible(card)
    assert "on its own training images" in card
    assert "split train, also used for training" in card


def test_a_card_of_many_classes_is_short_and_fast_to_render() -> None:
    start = time.process_time()
    assert len(many([(1, 2)] * 10_000)) < 20_000
    assert time.process_time() - start < 10  # about 1 s; quadratic time would take 20 s


def test_long_class_names_are_shortened_and_blank_ones_quoted() -> None:
    names = ["", " ", *(f"{n}{'|' * 100_000}" for n in range(30))]
    count, escaped = len(names), "\\|"
    card = render_card(a_record(names, [[(n, 1), ((n + 1) % count, 1)] for n in range(count)]))
    assert len(card.encode()) < CARD_BYTES / 10
    assert f"| 0{escaped * 98}… | 2 | 1 |" in card
    assert '| "" | 2 | 1 |' in card
    assert '| " " | 2 | 1 |' in card

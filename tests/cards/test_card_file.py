"""What an owner writes into a card stays when the card is written anew, or nothing is written."""

import time
from pathlib import Path

from pytest import mark, raises
from support.records import a_record

from resnext_hub.cards.card_file import CardConflictError, CardFile, Kept, choose_kept, put_together, take_apart
from resnext_hub.cards.model_card import TAGS, card_parts, render_card

RECORD = a_record()
PRISTINE = render_card(RECORD, "me/name", "mit")


def edited(text: str, before: str = "", after: str = "", field: str = "", tag: str = "") -> str:
    """Edit a card as its owner does, outside the part of the tool."""
    text = text.replace("<!-- resnext-hub card {", f"{before}<!-- resnext-hub card {{", 1) + after
    text = text.replace("---\n\n", f"{field}---\n\n", 1)
    return text.replace('- "resnext"\n', f'- "resnext"\n{tag}', 1)


def again(text: str, license: str = "apache-2.0") -> str:
    """Write the card anew, as the next push does."""
    metadata, body = card_parts(RECORD, "me/name", license)
    return put_together(metadata, body, choose_kept(None, take_apart(text, TAGS), {"license"}))


@mark.parametrize(
    "words",
    [
        {"before": "My words.\n\n"},
        {"after": "\n## My heading\n\n![image](mine.png)\n"},
        {"field": "language: no  # Norwegian\n"},
        {"field": "widget:\n- src: a.png\n  example_title: A\n"},
        {"tag": "- cats\n"},
        {"before": "a\n", "after": "---\n\nb", "field": "thumbnail: x.png\n", "tag": "- b\n- 'c d'\n"},
        {"after": "<!-- a comment -->\n"},
    ],
    ids=lambda words: ", ".join(words),
)
def test_what_stands_outside_the_marks_is_kept_to_the_letter(words: dict[str, str]) -> None:
    text = again(edited(PRISTINE, **words))
    for name, value in words.items():
        assert value.replace("- cats", '- "cats"') in text or name == "tag", name
    assert "license: apache-2.0" in text
    assert again(text) == text
    assert take_apart(text, TAGS).kept.digest == take_apart(edited(PRISTINE, **words), TAGS).kept.digest


@mark.parametrize("text", [PRISTINE.replace("\n", "\r\n"), "\ufeff" + PRISTINE], ids=["line ends", "byte order mark"])
def test_line_ends_and_a_byte_order_mark_of_another_system_change_nothing(text: str) -> None:
    card = take_apart(text, TAGS)
    assert not card.foreign
    assert not card.kept


@mark.parametrize(
    ("old", "new", "said"),
    [
        ("## Limits\n", "## Limits\n\nMy limit.\n", "was edited inside the part that push writes"),
        ("license: mit", "license: other", "was edited inside the part that push writes"),
        ("value: 0.8\n", "value: 0.99\n", "was edited inside the part that push writes"),
        ("<!-- resnext-hub card {", "<!-- {", "is not from push"),
        ("<!-- resnext-hub card end -->", "", "is not from push"),
    ],
)
def test_words_that_would_be_lost_are_refused(old: str, new: str, said: str) -> None:
    assert old in PRISTINE
    with raises(CardConflictError, match=said):
        again(PRISTINE.replace(old, new, 1))


@mark.parametrize(
    "text",
    [
        "---\n[\n---\n",
        "---\na: &a [*a]\n---\n",
        "---\n" + "[" * 100_000 + "\n---\n",
        "---\na: !!python/name:os.system\n---\n",
    ],
    ids=["cut", "alias", "brackets", "tag"],
)
def test_metadata_that_cannot_be_read_are_refused(text: str) -> None:
    with raises(ValueError, match=r"expected|aliases|deeply|tag"):
        take_apart(text, TAGS)


def test_a_card_of_metadata_alone_gives_way_and_keeps_its_other_fields() -> None:
    text = again("---\nlicense: mit\nlanguage: en\n---\n")
    assert "license: apache-2.0\n" in text
    assert "license: mit" not in text
    assert "language: en\n" in text


def pushed(mine: str) -> CardFile:
    """Return a card on the Hub after a push of what its owner wrote."""
    return take_apart(put_together("license: mit\ntags: []\n", "body\n", Kept(after=mine)), TAGS)


def local(mine: str) -> CardFile:
    return CardFile(Kept(after=mine), marked=True)


def on_the_web(mine: str, before: str) -> CardFile:
    """Return a card on the Hub whose owner changed there what was pushed before."""
    card = pushed(before)
    return CardFile(Kept(after=mine), marked=True, kept_then=card.kept_then)


@mark.parametrize(
    ("here", "there", "expected"),
    [
        (None, None, ""),
        (local("a"), None, "a"),
        (local(""), pushed("a"), "a"),
        (local("a"), pushed(""), "a"),
        (local("b"), pushed("a"), "b"),  # edited here since the push
        (local("a"), on_the_web("b", before="a"), "b"),  # edited there
        (local("a"), on_the_web("a", before=""), "a"),
        (local(""), on_the_web("b", before=""), "b"),
    ],
)
def test_of_two_cards_the_one_that_was_edited_is_kept(
    here: CardFile | None, there: CardFile | None, expected: str
) -> None:
    assert choose_kept(here, there, set()).after == expected


def test_two_cards_that_were_both_edited_are_refused() -> None:
    with raises(CardConflictError, match="both edited since the last push"):
        choose_kept(local("b"), on_the_web("c", before="a"), set())


def test_a_card_is_made_of_a_record_alone(tmp_path: Path) -> None:
    assert render_card(RECORD, "me/name", "mit") == PRISTINE
    card = take_apart(PRISTINE, TAGS)
    assert (card.marked, card.edited, bool(card.kept)) == (True, False, False)


def test_a_second_part_of_the_tool_is_no_word_of_the_owner() -> None:
    own = PRISTINE[PRISTINE.index("<!-- resnext-hub card {") :]
    assert take_apart(PRISTINE + own, TAGS).edited
    assert not take_apart(PRISTINE + "<!-- resnext-hub card end -->\n", TAGS).edited


@mark.parametrize(
    "mark_text",
    ["{}", '{"keys": 1}', "{bad}", "{" * 7000, '{"a":' * 1500],
    ids=["empty", "keys", "bad", "open", "deep"],
)
def test_a_damaged_mark_is_refused(mark_text: str) -> None:
    text = f"<!-- resnext-hub card {mark_text} -->\nx\n<!-- resnext-hub card end -->\n"
    with raises(ValueError, match="its mark is damaged"):
        take_apart(text, TAGS)


@mark.parametrize("part", ["} ", "{ ", "<!-- resnext-hub card {", "{}} -->\r"])
def test_a_page_made_to_take_time_takes_none(part: str) -> None:
    text = "<!-- resnext-hub card {" + part * ((1 << 20) // len(part))
    begin = time.process_time()
    assert not take_apart(text, TAGS).marked
    assert time.process_time() - begin < 5

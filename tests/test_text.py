"""Names that come from data are shown as text, wherever they are shown."""

import ast

import matplotlib
from pytest import mark

from resnext_hub.text import code_span, is_printable, markdown, plot_text, printable, python_string


@mark.parametrize(
    ("name", "shown"),
    [
        ("cat\nred", r"cat\nred"),
        ("tab\there", r"tab\there"),
        ("\x1b[31mred", r"\x1b[31mred"),
        ("nul\0", r"nul\x00"),
        ("a\u202egpj.exe", r"a\u202egpj.exe"),
        ("a\u2066b\u2069", r"a\u2066b\u2069"),
        ("line\u2028end", r"line\u2028end"),
        ("caf\udce9", r"caf\xe9"),
        ("Zürich 東京", "Zürich 東京"),
        ("می\u200cخواهم",) * 2,  # noqa: RUF001 - a joiner that spells a word stays
        ("👩\u200d🚀", "👩\u200d🚀"),
        ("\U0001fae8 \U000323af", "\U0001fae8 \U000323af"),  # which Python 3.11 does not know yet
        ("\ufffe\ufdd0\U0010ffff", r"\ufffe\ufdd0\U0010ffff"),
    ],
)
def test_names_are_printed_in_one_line_without_control_characters(name: str, shown: str) -> None:
    assert printable(name) == shown
    printable(name).encode()  # what is shown can be written


@mark.parametrize(
    "name",
    ["<script>alert(1)</script>", "![x](https://a.example/x.png)", "a|b", "`x`", "**b**", "$5_$10$", "[l](u)", "# h"],
)
def test_names_are_text_in_markdown(name: str) -> None:
    shown = markdown(name)
    assert "<" not in shown
    assert "://" not in shown
    for special in "`*_[]|$!#":
        assert special not in shown.replace(f"\\{special}", "").replace("&#58;", "")


def test_back_ticks_do_not_end_inline_code() -> None:
    assert code_span("plain") == "`plain`"
    assert code_span("a`b``c") == "```a`b``c```"
    assert code_span("`x`") == "`` `x` ``"


@mark.parametrize(
    "text",
    ['r "1"', "r\\x", "r 😀`|$", "line\nend", "a\u202eb", "\U000e0041", "caf\udce9", "ends\\", "%s", "\0"],
)
def test_a_string_for_python_is_that_text_and_printable(text: str) -> None:
    literal = python_string(text)
    assert ast.literal_eval(literal) == text
    assert is_printable(literal)


@mark.parametrize("name", ["$", "$$", "$5_$10", r"$\frac{1}{0$", "a$b$c", r"\$"])
def test_names_are_drawn_and_not_read_as_mathematics(name: str) -> None:
    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots()
    axes.set_title(plot_text(name))
    figure.canvas.draw()
    pyplot.close(figure)

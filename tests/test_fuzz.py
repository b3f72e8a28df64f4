"""Argument lists drawn at random end in an exit code and at most one line of error, never in a traceback."""

import random
from collections.abc import Callable
from pathlib import Path

from resnext_hub.cli.main import build_parser
from resnext_hub.training.config import flat_fields

Command = Callable[..., tuple[int, str, str]]

COMMANDS = ("train", "info", "evaluate", "predict", "export", "push", "benchmark", "benchmark inference", "", "trian")

VALUES = ["", " ", "0", "-1", "nan", "1e400", "9" * 400, "x" * 5000, "a/b/c", "\x1b[31m", "\udcff"]
VALUES += ["a\0b", "--", "-", "=", "²"]


def flags_of(words: str) -> list[str]:
    """Flags of a command, and some that no command has."""
    parser = build_parser()
    for word in words.split():
        choices = next((action.choices for action in parser._actions if action.choices), None) or {}
        parser = choices.get(word, parser)
    return [flag for action in parser._actions for flag in action.option_strings] + ["--datset", "-x", "---", "--lr="]


def test_no_argument_list_ends_in_a_traceback(command: Command, tmp_path: Path) -> None:
    draw = random.Random(0)
    flags = {words: [flag for flag in flags_of(words) if flag not in ("-h", "--help")] for words in COMMANDS}
    for _ in range(60):
        words = draw.choice(COMMANDS)
        arguments = words.split()
        for _ in range(draw.randint(0, 4)):
            arguments += draw.sample([draw.choice(flags[words]), draw.choice(VALUES)], draw.randint(1, 2))
        # no dataset is there, so that nothing that happens to be right begins to train
        arguments += ["--dataset", str(tmp_path / "none")] if words == "train" else []
        arguments += ["--model", "none"] if words.startswith("benchmark ") else []
        code, _, err = command(*arguments)
        assert code in (0, 1, 2), arguments
        assert (code == 0) or err.count("\n") == 1, arguments
        assert err.isprintable() or err[:-1].isprintable(), arguments
    assert list(tmp_path.iterdir()) == []


def test_each_flag_of_train_refuses_nonsense_in_one_line(command: Command, tmp_path: Path) -> None:
    for name, field in flat_fields().items():
        if field.type is bool or name in ("dataset",):
            continue
        flag = "--" + name.replace("_", "-")
        code, _, err = command("train", "--dataset", tmp_path / "none", flag, "\x1b\n" * 500)
        assert code == 2, name
        assert err.count("\n") == 1, name
        assert "\x1b" not in err, name

"""Text, YAML and Python values mean the same setting, or are refused in one line that states the range."""

import os
import time
from pathlib import Path
from typing import Any

from pytest import fixture, mark, raises

from resnext_hub.errors import RequestError
from resnext_hub.runs.request import merge_settings
from resnext_hub.settings import SEEDS, check_value, did_you_mean
from resnext_hub.text import printable
from resnext_hub.training.config import ALIASES, TrainConfig, flat_fields


@fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "mine.yaml"


@mark.parametrize(
    ("text", "expected"),
    [
        ("lr: 1e-3", 0.001),
        ("lr: 3E-4", 0.0003),
        ("lr: +1.5e-3", 0.0015),
        ("lr: '1e-3'", 0.001),
        ("weight_decay: .5", 0.5),
        ("weight_decay: 0", 0.0),
        ("batch_size: 1_000", 1000),
        ("max_steps: 1e3", 1000),
        ("compile: yes", True),
        ("compile: Off", False),
        ("mixed_precision: no", "no"),
        ("dataset: 2024-01-01", "2024-01-01"),
        ("dataset: 010", "010"),
        ("threads: 2", "2"),
        ("lr: null", None),
        ("pretrained:", None),
        ("%YAML 1.1\n---\nlr: 1e-3", 0.001),
    ],
)
def test_a_file_means_what_the_field_expects(text: str, expected: Any, file: Path) -> None:
    file.write_text(text)
    settings, _ = merge_settings({}, "finetune", file)
    value = TrainConfig.from_flat(settings).to_flat()[text.splitlines()[-1].partition(":")[0]]
    assert value == expected
    assert type(value) is type(expected)


@mark.parametrize(
    ("text", "reason"),
    [
        ("batch_size: 010", "batch_size=010: expected a whole number from 1"),
        ("epochs: 1:30", "epochs=1:30: expected a number from 0 to 1,000,000"),
        ("image_size: 0x20", "image_size=0x20: expected a whole number"),
        ("max_steps: 1.5", "max_steps=1.5: expected a whole number"),
        ("lr: .nan", "lr=.nan: expected a number"),
        ("lr: 1e999", "lr=inf: expected a number above 0 and at most 1,000"),
        ("seed: " + "9" * 5000, "expected a whole number from 0 to 9,223,372,036,854,775,807"),
        ("epochs: null", "epochs=None: expected a number"),
        ("dataset: 1.10", "dataset=1.1: expected text, in quotes"),
        ('dataset: "a\\0b"', "contains a null character"),
        ("dataset: ''", "dataset is empty"),
        ("scale: 0.5", "scale=0.5: expected 2 numbers"),
        ("scale: [a, b]", "scale=a: expected a number"),
        ("imgsz: 64", r"unknown setting imgsz; did you mean image_size\?"),
        ("batch-size: 64", r"unknown setting batch-size; did you mean batch_size\?"),
    ],
)
def test_a_wrong_value_in_a_file_is_refused_by_name(text: str, reason: str, file: Path) -> None:
    file.write_text(text)
    with raises(RequestError, match=reason):
        TrainConfig.from_flat(merge_settings({}, "finetune", file)[0])


@mark.parametrize(
    ("content", "reason"),
    [
        (b"lr: 1\nlr: 2", "a name occurs twice"),
        (b"lr: 1\n---\nlr: 2", "another document"),
        (b"a: &a [1]\nb: [*a, *a]", "line 2: aliases are not supported"),
        (b"lr: !!python/object/apply:os.system ['x']", "line 1: the tag .* is not supported"),
        (b"lr: !!int ten", "the tag .* is not supported"),
        (b"- 1", "expected settings, one `name: value` per line"),
        (b"5", "expected settings"),
        (b"1: 2", "expected settings"),
        (b"? [a]\n: 2", "unhashable key"),
        (b"lr: [", "line 1: "),
        (b"[" * 50_000, "nested too deeply"),
        (b"x" * 300_000, "300000 bytes"),
        (b"\x00\xff", "cannot be read"),
        ("lr: 1".encode("utf-16"), "cannot be read"),
        (b"lr: \x1b", "cannot be read"),
    ],
    ids=lambda value: str(value[:12]),
)
def test_a_file_that_is_not_one_mapping_is_refused_at_once(content: bytes, reason: str, file: Path) -> None:
    file.write_bytes(content)
    start = time.process_time()
    with raises(RequestError, match=reason) as error:
        merge_settings({}, None, file)
    assert "\n" not in str(error.value)
    assert time.process_time() - start < 5.0


def test_only_a_regular_file_is_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    for path, kind in ((tmp_path, "a folder"), (tmp_path / "fifo", "a FIFO"), (Path("/dev/zero"), "a device")):
        with raises(RequestError, match=f"not a regular file but {kind}"):
            merge_settings({}, None, path)
    with raises(RequestError, match="No such file"):
        merge_settings({}, None, tmp_path / "none")


def test_an_empty_file_has_no_settings(file: Path) -> None:
    file.write_text("# nothing yet\n")
    assert merge_settings({"dataset": "pets"}, None, file) == ({"dataset": "pets"}, None)


@mark.parametrize("name", flat_fields())
def test_extreme_values_of_each_field_are_taken_or_refused_in_one_line(name: str) -> None:
    numbers = [0, -1, 1, 2**31, 2**63 - 1, 2**63, 10**400, -0.0, 5e-324, 1e308, float("nan"), float("inf")]
    texts = [
        "",
        " ",
        "0",
        "-1",
        "1e400",
        "nan",
        "²",
        "٣",
        "0x10",
        "x" * 100_000,
        "a\0b",
        "\x1b[31m\n",
        "\udcff",
        "auto",
    ]
    others = [None, True, [], [1], [1, 2], [1, 2, 3], ["a", "b"], {}, {"a": 1}, b"x", object()]
    for value in (*numbers, *texts, *others):
        try:
            config = TrainConfig.from_flat({name: value})
        except RequestError as error:
            message = str(error)
        else:
            message = ""
            assert TrainConfig.from_flat(config.to_flat()) == config
        assert len(message) < 1000
        assert message == printable(message)


def test_the_greatest_seed_is_one_that_torch_takes() -> None:
    import torch

    state = torch.get_rng_state()
    assert torch.manual_seed(SEEDS).initial_seed() == SEEDS
    torch.set_rng_state(state)
    assert check_value("seed", str(SEEDS), flat_fields()["seed"].type) == SEEDS
    with raises(RequestError, match="expected a whole number from 0"):
        TrainConfig(seed=SEEDS + 1)


def test_every_alias_leads_to_a_setting() -> None:
    assert set(ALIASES.values()) <= flat_fields().keys()
    assert not ALIASES.keys() & flat_fields().keys()


def test_a_close_word_is_offered_and_no_distant_one() -> None:
    assert did_you_mean("trainn", ["train", "push"]) == "; did you mean train?"
    assert did_you_mean("zzz", ["train", "push"]) == ""
    assert did_you_mean("fit", ["train"], {"fit": "train"}) == "; did you mean train?"

"""Mutate files that come from elsewhere: each is read as it says, or refused in a line, in bounded time and memory.

The long form is `python tests/fuzz.py [--examples N] [--seed N] [TARGET ...]`; the short one is test_fuzz_files.py.
"""

import argparse
import csv
import dataclasses
import faulthandler
import io
import json
import logging
import resource
import struct
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps
from safetensors.torch import load_file
from support.records import a_record
from timm.models._hub import save_for_hf

import resnext_hub  # noqa: F401 - registers the variants
from resnext_hub.data.config import DataConfig
from resnext_hub.data.decode import UnreadableImageError, decode
from resnext_hub.data.splits import load_splits
from resnext_hub.errors import RequestError, RunError
from resnext_hub.inference.classifier import load
from resnext_hub.record import RunRecord
from resnext_hub.run_folder import RunFolder
from resnext_hub.text import printable
from resnext_hub.training.checkpoint import BestFacts, StateFacts, latest_checkpoint, save_checkpoint
from resnext_hub.training.metrics import METRICS, LineLog, read_lines
from resnext_hub.training.unreadable import read_unreadable

ROUND = 250
"""Inputs that are drawn together: hypothesis keeps about 1 MB of each until the last, which is no growth of ours."""

SECONDS = 10
"""Time within which each input is judged."""

GROWTH = 2 << 30
"""Bytes by which the process may grow over inputs that are drawn together."""

SCALARS = [
    None, True, False, 0, -1, 1, 3, 7, 2**31, 2**63, 10**30, 0.5, -0.0, 1e-9, 1e308, "", "x", "cat", "nan", "none", "0",
    "a\x1b[31m\n", "\u202ea", "\x00", "🙂", "../../etc/passwd", "/dev/zero", "os.system", "swish", "$1_$2",
    "resnet50", "vit_base_patch16_224", "https://a.example/x.pth",
]  # fmt: skip

VALUES: list[object] = [*SCALARS, [], {}, [[]], [1], [1, 2], [3, 32, 32], [0, 0, 0], [1e9] * 3, ["a", "b"], ["a"] * 10,
          {str(n): f"c{n}" for n in range(10)}, {"a": {"b": [None]}}, [200_000] * 3, list(range(3000))]  # fmt: skip

KEYS = [
    "hf_hub_filename", "file", "url", "hf_hub_id", "custom_load", "state_dict", "source", "num_classes", "label_names",
    "features_only", "act_layer", "norm_layer", "layers", "block", "cardinality", "base_width", "input_size", "std",
    "mean", "crop_pct", "crop_mode", "interpolation", "model_args", "pretrained_cfg", "architecture", "in_chans",
    "drop_rate", "scriptable", "checkpoint_path", "strict", "step", "split", "reason", "sha256", "facts",
]  # fmt: skip

WHOLES = [
    b"",
    b"null",
    b"[]",
    b"{}",
    b"0",
    b'"x"',
    b"[" * 200_000,
    b'{"a":' * 100_000,
    b"\xff\xfe{}",
    b"\0" * 64,
    b"PK\3\4",
]


def changed_bytes(original: bytes) -> st.SearchStrategy[bytes]:
    """Draw a file with a few bytes changed, cut, repeated or put in, or another one altogether."""
    place = st.integers(0, max(len(original) - 1, 0))
    change = st.one_of(
        st.tuples(st.just("flip"), place, st.integers(0, 7)),
        st.tuples(st.just("cut"), place, st.integers(1, 64)),
        st.tuples(st.just("end"), place, st.just(0)),
        st.tuples(st.just("repeat"), place, st.integers(1, 64)),
        st.tuples(st.just("insert"), place, st.binary(min_size=1, max_size=8)),
    )

    def apply(changes: list[tuple[str, int, Any]]) -> bytes:
        data = bytearray(original)
        for kind, at, value in changes:
            if kind == "flip" and at < len(data):
                data[at] ^= 1 << value
            elif kind == "cut":
                del data[at : at + value]
            elif kind == "end":
                del data[at:]
            elif kind == "repeat":
                data[at:at] = data[at : at + value]
            elif kind == "insert":
                data[at:at] = value
        return bytes(data)

    return st.one_of(st.lists(change, min_size=1, max_size=3).map(apply), st.sampled_from(WHOLES))


def changed_json(original: Any) -> st.SearchStrategy[Any]:
    """Draw a JSON value with some of its parts replaced, removed or added."""
    places = list(_places(original))
    change = st.tuples(
        st.sampled_from(["replace", "remove", "add", "swap"]),
        st.sampled_from(places),
        st.sampled_from(KEYS),
        st.sampled_from(VALUES),
    )

    def apply(changes: list[tuple[str, tuple[Any, ...], str, Any]]) -> Any:
        value = json.loads(json.dumps(original))
        for kind, place, key, new in changes:
            value = _changed(value, kind, place, key, new)
        return value

    return st.lists(change, min_size=1, max_size=2).map(apply)


def _places(value: Any, above: tuple[Any, ...] = ()) -> Any:
    yield above
    if isinstance(value, dict):
        for key, part in value.items():
            yield from _places(part, (*above, key))
    elif isinstance(value, list):
        for index, part in enumerate(value[:4]):
            yield from _places(part, (*above, index))


def _changed(value: Any, kind: str, place: tuple[Any, ...], key: str, new: Any) -> Any:
    if not place:
        return {**value, key: new} if kind == "add" and isinstance(value, dict) else new if kind == "replace" else value
    first, *rest = place
    in_list = isinstance(value, list) and isinstance(first, int) and first < len(value)
    known = first in value if isinstance(value, dict) else in_list
    if not known:  # an earlier change took it away
        return value
    if not rest and kind == "remove":
        if isinstance(value, dict):
            return {name: part for name, part in value.items() if name != first}
        return value[:first] + value[first + 1 :]
    if not rest and kind == "swap" and isinstance(value, list):
        return value[::-1]
    part = _changed(value[first], kind, tuple(rest), key, new)
    if isinstance(value, dict):
        return {**value, first: part}
    return [*value[:first], part, *value[first + 1 :]]


def text_of(value: Any) -> bytes:
    """Write JSON as Python does, control characters escaped and surrogates allowed."""
    return json.dumps(value).encode()


def lines_of(value: Any) -> bytes:
    """Write the parts of a JSON list a line each."""
    return b"".join(text_of(line) + b"\n" for line in (value if isinstance(value, list) else [value]))


@dataclass(frozen=True)
class Target:
    """A kind of file: what to draw, and how to judge one; judging raises AssertionError for a wrong reading."""

    original: bytes
    inputs: st.SearchStrategy[bytes]
    judge: Callable[[Path, bytes], None]


@cache
def model_folder() -> Path:
    """Return a folder that timm wrote, of a model of ten classes."""
    folder = Path(tempfile.mkdtemp(prefix="fuzz-model-"))
    torch.manual_seed(0)
    import timm

    model = timm.create_model("test_resnet", num_classes=10, pretrained_cfg_overlay={"input_size": (3, 32, 32)})
    save_for_hf(model, folder, safe_serialization=True, model_config={"label_names": [f"c{n}" for n in range(10)]})
    return folder


def judge_model_config(folder: Path, content: bytes) -> None:
    """Where a config.json is accepted, weights, class names and normalization are those of the files."""
    (folder / "config.json").write_bytes(content)
    weights = folder / "model.safetensors"
    if not weights.exists():
        weights.symlink_to(model_folder() / "model.safetensors")
    loaded = load(str(folder))
    stated = json.loads(content)
    require_weights(loaded, load_file(weights))
    cfg = stated.get("pretrained_cfg") or {}
    names = stated.get("label_names") or cfg.get("label_names")
    if isinstance(names, dict):
        names = [names[str(n)] for n in range(10)]
    assert loaded.label_names == tuple(names or map(str, range(10))), (loaded.label_names, names)
    for key in ("mean", "std"):
        if cfg.get(key) is not None and isinstance(cfg[key], list) and len(cfg[key]) == 3:
            assert list(getattr(loaded.input, key)) == cfg[key], key


def judge_weights(folder: Path, content: bytes) -> None:
    """Where a safetensors file is accepted, the model has the values that stand in it."""
    (folder / "config.json").write_bytes((model_folder() / "config.json").read_bytes())
    (folder / "model.safetensors").write_bytes(content)
    loaded = load(str(folder))
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    types = {"F32": np.float32, "F16": np.float16, "F64": np.float64, "I64": np.int64}
    tensors = {}
    for name, entry in header.items():
        if name == "__metadata__" or entry["dtype"] not in types:
            continue
        begin, end = entry["data_offsets"]
        data = np.frombuffer(content[8 + length :][begin:end], types[entry["dtype"]])
        tensors[name] = torch.from_numpy(data.copy().reshape(entry["shape"]))
    require_weights(loaded, tensors)


def require_weights(loaded: Any, tensors: dict[str, torch.Tensor]) -> None:
    """Check that a model has the values of a file, and is usable."""
    found = loaded.model.state_dict()
    for name, tensor in tensors.items():
        assert torch.equal(found[name], tensor.to(found[name].dtype)), name
        assert found[name].isfinite().all(), name


def judge_record(folder: Path, content: bytes) -> None:
    """Where a record is accepted, it says what the file says."""
    path = folder / "record.json"
    path.write_bytes(content)
    record, stated = RunRecord.load(path), json.loads(content)
    assert record.label_names == stated["label_names"]
    assert record.evaluation.correct == stated["evaluation"]["correct"] <= record.evaluation.count
    assert record.evaluation.matrix.sum() == record.evaluation.count
    assert record.model.weights_sha256 == stated["model"]["weights_sha256"]
    assert record.model.model_args == stated["model"]["model_args"]


FACTS = StateFacts(
    optimizer={"state": {"0": {"betas": [0.9, 0.999]}}, "group": {"0": {"lr": 0.1}}},
    scaler=None,
    best=BestFacts(step=2, correct=5, loss=0.25, epoch=0.2),
    how={"processes": 1, "threads": 1},
    wall_seconds=1.5,
    resumes=0,
    skipped_steps=0,
    evaluated=True,
    position=(0, 48),
    fingerprint="0" * 64,
    settings={"lr": 0.1},
)


@cache
def checkpoint_folder() -> Path:
    """Return a folder with a checkpoint of one tensor."""
    folder = Path(tempfile.mkdtemp(prefix="fuzz-checkpoints-"))
    save_checkpoint(folder, 2, {"model": {"weight": torch.ones(3)}}, FACTS, 2)
    return folder


def judge_state(folder: Path, content: bytes) -> None:
    """A checkpoint's state is what was written, or the checkpoint counts as damaged."""
    step = folder / "step-00000002"
    step.mkdir()
    original = checkpoint_folder() / step.name
    (step / "model.safetensors").write_bytes((original / "model.safetensors").read_bytes())
    (step / "state.json").write_bytes(content)
    found = latest_checkpoint(folder)
    if found is not None:
        assert found.step == 2
        assert found.facts == FACTS


LINES = [
    {"step": 1, "epoch": 0.1, "lr": 0.1, "loss": 2.25, "images_per_second": 10.5, "data_wait": 0.1},
    {"step": 2, "epoch": 0.2, "eval_loss": 2.0, "eval_top1": 0.5, "eval_correct": 5, "eval_count": 10},
]


def parsed(text: bytes) -> Any:
    """Return what a line of JSON holds, or None."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def judge_metrics(folder: Path, content: bytes) -> None:
    """A run can always go on: whole lines that hold a step are kept, nothing else."""
    path = folder / "metrics.jsonl"
    path.write_bytes(content)
    read_lines(path, *METRICS)
    written = content.split(b"\n")
    (folder / "unreadable-0.jsonl").write_bytes(content)
    read_unreadable(RunFolder(folder))
    with LineLog(path, 2) as log:
        log.write(step=3, loss=1.0)
    *kept, last = map(json.loads, path.read_text().splitlines())
    assert last == {"step": 3, "loss": 1.0}
    known = [line for text in written if (line := parsed(text)) is not None]
    assert all(line in known for line in kept)
    assert all(type(line["step"]) is int and line["step"] <= 2 for line in kept)


@cache
def some_images() -> tuple[bytes, ...]:
    """Return small images in many formats, with EXIF, palettes, transparency and several frames."""
    grey = np.linspace(0, 255, 48 * 40).reshape(48, 40).astype(np.uint8)
    image = Image.fromarray(grey).convert("RGB")
    exif = Image.Exif()
    exif[0x0112] = 6
    made = []
    for options in (
        {"format": "PNG"}, {"format": "JPEG", "exif": exif}, {"format": "JPEG", "progressive": True}, {"format": "GIF"},
        {"format": "BMP"}, {"format": "TIFF"}, {"format": "TIFF", "compression": "tiff_lzw"}, {"format": "WEBP"},
        {"format": "PPM"},
    ):  # fmt: skip
        buffer = io.BytesIO()
        image.save(buffer, **options)
        made.append(buffer.getvalue())
    for other in (image.convert("P"), image.convert("LA"), Image.fromarray(grey.astype(np.uint16) * 257)):
        buffer = io.BytesIO()
        other.save(buffer, "PNG")
        made.append(buffer.getvalue())
    buffer = io.BytesIO()
    image.save(buffer, "GIF", save_all=True, append_images=[ImageOps.invert(image)] * 3)
    return (*made, buffer.getvalue())


def judge_image(folder: Path, content: bytes) -> None:
    """An image is decoded to RGB, or unreadable with a reason of one line."""
    try:
        image = decode({"bytes": content, "path": None})
    except UnreadableImageError as error:
        require_line(error)
        return
    assert image.mode == "RGB"
    assert np.asarray(image).shape == (image.height, image.width, 3)


ROWS = [{"file_name": f"{n}.png", "label": "cat" if n % 2 else "dog"} for n in range(12)]

TABLE = "file_name,label\n" + "".join(f"{row['file_name']},{row['label']}\n" for row in ROWS)


def judge_table(folder: Path, content: bytes) -> None:
    """Where a CSV of labels is accepted, every image has the label of its row."""
    header, *rows = csv.reader(io.StringIO(_judge_labels(folder, "metadata.csv", content), newline=""))
    names = [name.strip(" \t").casefold() for name in header]  # in any case; blanks beside commas are no text
    _require_labels(folder, [dict(zip(names, (cell.strip(" \t") for cell in row), strict=False)) for row in rows])


def judge_json_table(folder: Path, content: bytes) -> None:
    """The same of JSON lines."""
    lines = _judge_labels(folder, "metadata.jsonl", content).splitlines()
    _require_labels(folder, [row for line in lines if isinstance(row := parsed(line.encode()), dict)])


def _judge_labels(folder: Path, name: str, content: bytes) -> str:
    for split in ("train", "test"):
        (folder / "set" / split).mkdir(parents=True)
        for n in range(12):
            (folder / "set" / split / f"{n}.png").write_bytes(some_images()[0])
    (folder / "set" / "test" / "metadata.csv").write_text(TABLE)
    (folder / "set" / "train" / name).write_bytes(content)
    load_splits(DataConfig(dataset=str(folder / "set")))
    return content.decode("utf-8-sig")


def _require_labels(folder: Path, rows: list[dict[str, Any]]) -> None:
    splits = load_splits(DataConfig(dataset=str(folder / "set")))
    part: Any = splits.train
    stated = {(str(row.get("file_name")), printable(row.get("label"))) for row in rows}
    for index, label in enumerate(part.labels):
        path = Path(part.row(index)["path"])
        assert path.parent.name == "train", path
        assert (path.name, splits.label_names[label]) in stated, path


def _json_target(original: bytes, judge: Callable[[Path, bytes], None]) -> Target:
    return Target(original, st.one_of(changed_json(json.loads(original)).map(text_of), changed_bytes(original)), judge)


def _weights_target() -> Target:
    original = (model_folder() / "model.safetensors").read_bytes()
    return Target(original, st.one_of(changed_header(original), changed_bytes(original)), judge_weights)


TARGETS: dict[str, Callable[[], Target]] = {
    "config.json": lambda: _json_target((model_folder() / "config.json").read_bytes(), judge_model_config),
    "model.safetensors": _weights_target,
    "record.json": lambda: _json_target(text_of(dataclasses.asdict(a_record())), judge_record),
    "state.json": lambda: _json_target(state_content(), judge_state),
    "metrics.jsonl": lambda: Target(
        lines_of(LINES), st.one_of(changed_json(LINES).map(lines_of), changed_bytes(lines_of(LINES))), judge_metrics
    ),
    "image": lambda: Target(some_images()[0], st.one_of(*map(changed_bytes, some_images())), judge_image),
    "metadata.csv": lambda: Target(TABLE.encode(), changed_bytes(TABLE.encode()), judge_table),
    "metadata.jsonl": lambda: Target(
        lines_of(ROWS), st.one_of(changed_json(ROWS).map(lines_of), changed_bytes(lines_of(ROWS))), judge_json_table
    ),
}


def state_content() -> bytes:
    """Return the state of a whole checkpoint."""
    return (checkpoint_folder() / "step-00000002" / "state.json").read_bytes()


def changed_header(original: bytes) -> st.SearchStrategy[bytes]:
    """Draw a safetensors file with another header over the same values."""
    (length,) = struct.unpack("<Q", original[:8])

    def join(header: Any) -> bytes:
        text = text_of(header)
        return struct.pack("<Q", len(text)) + text + original[8 + length :]

    return changed_json(json.loads(original[8 : 8 + length])).map(join)


def require_line(error: Exception) -> None:
    """Check that a message is one line that a terminal shows as it is."""
    message = str(error)
    assert message.isprintable(), message
    assert len(message) < 1000, message


def fuzz(name: str, examples: int, number: int = 0) -> dict[str, int]:
    """Judge mutated files of one kind; return how many were accepted and refused.

    Raises:
        AssertionError: If one is read wrongly, or refused in other than a line.
        Exception: Whatever else reading one raises: a traceback for a user.
    """
    target = TARGETS[name]()
    logging.getLogger("resnext_hub").setLevel(logging.ERROR)
    torch.set_num_threads(1)  # small tensors: threads would wait for each other
    counts = {"accepted": 0, "refused": 0}
    with tempfile.TemporaryDirectory() as folder:
        target.judge(Path(folder), target.original)  # what is imported at the first use is not timed below
    for start in range(0, examples, ROUND):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

        @seed(number + 1_000_003 * start)
        @settings(
            max_examples=min(ROUND, examples - start),
            deadline=None,
            database=None,
            suppress_health_check=list(HealthCheck),
        )
        @given(target.inputs)
        def check(content: bytes) -> None:
            with tempfile.TemporaryDirectory() as folder:
                faulthandler.dump_traceback_later(SECONDS, exit=True)
                try:
                    target.judge(Path(folder), content)
                    counts["accepted"] += 1
                except (RequestError, RunError) as error:
                    counts["refused"] += 1
                    require_line(error)
                finally:
                    faulthandler.cancel_dump_traceback_later()

        check()
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
        assert grown < GROWTH, f"the process grew by {grown / 1e9:.1f} GB"
    return counts


def main() -> None:
    """Run the long form."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("target", nargs="*", default=list(TARGETS), help=f"of {', '.join(TARGETS)}; all if none")
    parser.add_argument("--examples", type=int, default=10_000, help="inputs of each target (default: 10000)")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    for name in options.target:
        begin = time.monotonic()
        counts = fuzz(name, options.examples, options.seed)
        print(f"{name}: {counts['accepted']} read, {counts['refused']} refused, {time.monotonic() - begin:.0f} s")


if __name__ == "__main__":
    main()

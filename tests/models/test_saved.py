"""Model folders are validated before a model is built, and only the validated files are loaded."""

import copy
import json
import os
import re
import shutil
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from PIL import Image
from pytest import MonkeyPatch, fixture, mark, raises
from safetensors.torch import load_file, save_file
from support.processes import save_with_timm

from resnext_hub.errors import RequestError, RunError
from resnext_hub.inference.classifier import from_hub, load
from resnext_hub.inference.prediction import Prediction, predict
from resnext_hub.models.fetch import forget
from resnext_hub.models.lookup import build_model, find_model, portable_architecture, variant_of
from resnext_hub.models.saved import HEADER_BYTES, read_model
from resnext_hub.models.saved_config import parse_config

NAMES = [str(number) for number in range(10)]


@fixture(scope="module")
def written(tmp_path_factory) -> Path:
    """A model folder of test_resnet with 10 classes at 32 px, as timm writes it."""
    folder = save_with_timm(tmp_path_factory.mktemp("saved") / "model", "test_resnet", 32)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"label_names": NAMES}))
    return folder


@fixture
def folder(written: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(written, tmp_path / "model"))


def change(folder: Path, **entries: Any) -> None:
    """Change entries of config.json; `outer__inner` names a nested one."""
    config = json.loads((folder / "config.json").read_text())
    for name, value in entries.items():
        *outer, key = name.split("__")
        within = config
        for part in outer:
            within = within.setdefault(part, {})
        within[key] = value
    (folder / "config.json").write_text(json.dumps(config))


def refusal(folder: Path) -> str:
    """Return the one-line error for a folder, which begins with the folder's name."""
    with raises(RequestError) as caught:
        load(str(folder))
    message = str(caught.value)
    assert message.startswith(str(folder))
    assert "\n" not in message
    assert message.isprintable()
    return message


@mark.parametrize(
    ("key", "value"),
    [
        ("hf_hub_filename", "other.safetensors"),
        ("hf_hub_filename", "pytorch_model.bin"),
        ("hf_hub_id", "you/model"),
        ("file", "/etc/passwd"),
        ("file", "other.safetensors"),
        ("url", "http://example.com/model.pth"),
        ("url", ["http://example.com/model.pth", "model.pth"]),
        ("source", "hf-hub"),
        ("source", "local-dir"),
        ("state_dict", {"fc.weight": [1]}),
        ("custom_load", True),
        ("custom_load", "hf"),
        ("label_offset", 1),
        ("sparkle", 1),
    ],
)
def test_a_key_that_steers_loading_is_refused_by_name(folder: Path, key: str, value: Any) -> None:
    change(folder, **{f"pretrained_cfg__{key}": value})
    assert f"config.json has pretrained_cfg.{key} {json.dumps(value)}" in refusal(folder)


def test_empty_keys_and_unknown_top_level_keys_are_ignored(folder: Path) -> None:
    change(folder, pretrained_cfg__url="", pretrained_cfg__file=None, pretrained_cfg__custom_load=False, sparkle=[1])
    assert load(str(folder)).label_names == tuple(NAMES)


def test_no_other_file_of_the_folder_is_ever_opened(folder: Path) -> None:
    for name in ("pytorch_model.bin", "model.pth", "open_clip_model.safetensors"):
        os.mkfifo(folder / name)  # opening one would block
    assert load(str(folder)).label_names == tuple(NAMES)
    (folder / "model.safetensors").unlink()
    assert "there is no model.safetensors in" in refusal(folder)


@mark.parametrize(
    ("key", "value", "part"),
    [
        ("architecture", 5, "architecture 5: expected str, got int"),
        ("architecture", None, "architecture null: expected str"),
        ("architecture", ["test_resnet"], "expected str, got array"),
        ("architecture", "sparkle", "unknown to timm"),
        ("architecture", "test_vit", "does not match the architecture in config.json (test_vit"),
        ("architecture", "resnet18", "does not match the architecture in config.json (resnet18"),
        ("architecture", "hf-hub:you/model", "unknown to timm"),
        ("num_classes", 10**9, "num_classes 1000000000: expected int <= "),
        ("num_classes", 1000, "model_args.num_classes 10: expected 1000, the value of num_classes"),
        ("num_classes", -1, "num_classes -1: expected int >= 0"),
        ("num_classes", "10", 'num_classes "10": expected int'),
        ("num_classes", True, "num_classes true: expected int"),
        ("pretrained_cfg", [], "pretrained_cfg []: expected object, got array"),
        ("pretrained_cfg", "x", "expected object, got str"),
        ("model_args", [], "model_args []: expected object | null, got array"),
        ("model_args", "x", "expected object | null, got str"),
        ("model_args__num_classes", 7, "model_args.num_classes 7: expected 10, the value of num_classes"),
        ("model_args__base_width", 2_000_000, "model_args.base_width 2000000: expected int <= 1024"),
        ("model_args__base_width", 63, "test_resnet cannot be built with base_width=63"),
        ("model_args__base_width", "wide", 'model_args.base_width "wide": expected int'),
        ("model_args__cardinality", 0, "model_args.cardinality 0: expected int >= 1"),
        ("model_args__cardinality", 3, "cardinality=3"),
        ("model_args__layers", [10**7] * 4, "model_args.layers[0] 10000000: expected int <= 200"),
        ("model_args__layers", [150] * 4, "model_args.layers [150, 150, 150, 150]: too large for the"),
        ("model_args__layers", 10_000, "model_args.layers 10000: expected array"),
        ("model_args__layers", [1, 1], "expected array of length >= 4"),
        ("model_args__act_layer", "nope", "act_layer=nope"),
        ("model_args__act_layer", "os.system", "expected str matching regex"),
        ("model_args__block", "os.system", 'model_args.block "os.system": not allowed'),
        ("model_args__features_only", True, "model_args.features_only true: not allowed"),
        ("model_args__pretrained", True, "model_args.pretrained true: not allowed"),
        ("model_args__checkpoint_path", "/etc/passwd", "not allowed"),
        ("model_args__pretrained_strict", False, "not allowed"),
        ("model_args__device", "cuda", "not allowed"),
        ("model_args__block_args", {"attn_layer": "se"}, "not allowed"),
        ("model_args__sparkle", 1, "model_args.sparkle 1: test_resnet does not accept it"),
        ("model_args__drop_rate", "x", 'model_args.drop_rate "x": expected float'),
        ("model_args__drop_rate", 1.5, "model_args.drop_rate 1.5: expected float < 1.0"),
        ("model_args__drop_block_rate", -0.5, "expected float >= 0.0"),
        ("model_args__output_stride", 7, "model_args.output_stride 7: expected one of 8, 16, 32"),
        ("model_args__global_pool", "sparkle", "expected one of avg, max"),
        ("model_args__global_pool", "", "expected one of avg, max"),
        ("model_args__in_chans", 0, "expected int >= 1"),
        ("pretrained_cfg__input_size", [32, 32], "input_size [32, 32]: expected array of length 3"),
        ("pretrained_cfg__input_size", [3, 0, 32], "input_size[1] 0: expected int >= 1"),
        ("pretrained_cfg__input_size", [3, 32, -32], "input_size[2] -32: expected int >= 1"),
        ("pretrained_cfg__input_size", [3, 200_000, 200_000], "input_size[1] 200000: expected int <= 4096"),
        ("pretrained_cfg__input_size", [3, 32.5, 32], "input_size[1] 32.5: expected int"),
        ("pretrained_cfg__input_size", "abc", 'input_size "abc": expected array'),
        ("pretrained_cfg__crop_pct", -1, "crop_pct -1: expected float >= 0.05"),
        ("pretrained_cfg__crop_pct", 1e-9, "crop_pct 1e-09: expected float >= 0.05"),
        ("pretrained_cfg__crop_pct", 20, "crop_pct 20: expected float <= 1.25"),
        ("pretrained_cfg__crop_pct", "x", 'crop_pct "x": expected float'),
        ("pretrained_cfg__crop_mode", "evil", "expected one of center, squash, border"),
        ("pretrained_cfg__interpolation", "evil", 'interpolation "evil": expected one of nearest, bilinear'),
        ("pretrained_cfg__interpolation", 3, "interpolation 3: expected str"),
        ("pretrained_cfg__mean", "abc", 'mean "abc": expected array'),
        ("pretrained_cfg__mean", [0.5, 0.5], "mean [0.5, 0.5]: expected 3, one per channel"),
        ("pretrained_cfg__mean", [0.5, 0.5, 1e30], "mean[2] 1e+30: expected float <= 1.0"),
        ("pretrained_cfg__mean", [123.675, 116.28, 103.53], "mean[0] 123.675: expected float <= 1.0"),
        ("pretrained_cfg__std", [58.395, 57.12, 57.375], "std[0] 58.395: expected float <= 1.0"),
        ("pretrained_cfg__std", [0.5, 0, 0.5], "std[1] 0: expected float >= 0.0001"),
        ("pretrained_cfg__std", 0.5, "std 0.5: expected array"),
        ("pretrained_cfg__license", ["mit"], 'license ["mit"]: expected str'),
        ("label_names", "abcdefghij", 'label_names "abcdefghij": expected'),
        ("label_names", 10, "label_names 10: expected"),
        ("label_names", NAMES[:9], "9 names for 10 classes: expected one per class"),
        ("label_names", [], "0 names for 10 classes: expected one per class"),
        ("label_names", [*NAMES[:9], 9], "label_names[9] 9: expected str"),
        ("label_names", [*NAMES[:9], None], "label_names[9] null: expected str"),
        ("label_names", {str(n + 1): "x" for n in range(10)}, "expected the numbers 0 to 9 as keys"),
        ("label_names", {"0": "cat"}, "expected the numbers 0 to 9 as keys"),
        ("label_names", ["\x1b[2J\n" * 99, *NAMES], r"\u001b[2J"),
    ],
)  # fmt: skip
def test_an_invalid_value_is_refused_with_its_key(folder: Path, key: str, value: Any, part: str) -> None:
    change(folder, **{key: value})
    assert part in refusal(folder)


@mark.parametrize(
    ("content", "part"),
    [
        (b"", "damaged"),
        (b"{}", "missing required field architecture"),
        (b"[]", "expected `object`, got `array`"),
        (b"null", "expected `object`, got `null`"),
        (b"5", "expected `object`, got `int`"),
        (b"{", "truncated"),
        (b'{"architecture": "\xff"}', "config.json is damaged"),
        (b"\xff\xfe{\x00}\x00", "malformed"),
        (b"[" * 200_000, "expected `object`, got `array`"),
        (b'{"a":' * 200_000, "nested too deeply"),
        (b'{"architecture": "test_resnet", "pretrained_cfg": {"crop_pct": NaN}}', "malformed"),
        (b'{"architecture": "test_resnet", "pretrained_cfg": {"crop_pct": 1e999}}', "out of range"),
        (b'{"architecture": "test_resnet", "num_classes": 1' + b"0" * 5000 + b"}", "out of range"),
        (b" " * (1 << 24) + b"{}", "more than 16777216"),
    ],
    ids=lambda value: repr(value[:30]) if isinstance(value, bytes) else value,
)
def test_a_config_that_is_not_a_json_object_is_refused(folder: Path, content: bytes, part: str) -> None:
    (folder / "config.json").write_bytes(content)
    assert part.lower() in refusal(folder).lower()


@mark.parametrize(
    ("size", "crop_pct", "part"),
    [
        ([3, 4096, 4096], 0.05, "crop_pct 0.05: with input_size [3, 4096, 4096], images would be resized to 81,920 px"),
        ([3, 4096, 4096], 0.4999, "8,193 px: expected at most 8,192"),
        ([3, 512, 512], 0.06, "8,533 px: expected at most 8,192"),
        ([3, 32, 2048], 0.2, "10,240 px: expected at most 8,192"),
        ([3, 4096, 4096], 0.5, None),
        ([3, 408, 408], 0.05, None),
        ([3, 32, 32], 1.25, None),
    ],
)
def test_a_crop_that_resizes_images_beyond_the_limit_is_refused(
    size: list[int], crop_pct: float, part: str | None
) -> None:
    config = {"architecture": "test_resnet", "pretrained_cfg": {"input_size": size, "crop_pct": crop_pct}}
    if part is None:
        assert parse_config(config, "it").pretrained_cfg["crop_pct"] == crop_pct
        return
    with raises(RequestError, match=re.escape(part)):
        parse_config(config, "it")


def test_paths_that_are_not_regular_files_are_not_opened(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.unlink()
    os.mkfifo(weights)
    assert "not a regular file but a FIFO" in refusal(folder)
    weights.unlink()
    weights.symlink_to("/dev/zero")
    assert "not a regular file but a device" in refusal(folder)
    weights.unlink()
    weights.symlink_to(weights)
    assert "model.safetensors cannot be read" in refusal(folder)


def rewrite(folder: Path, name: str, tensor: torch.Tensor | None) -> None:
    """Replace or remove a tensor of the weights."""
    tensors = load_file(folder / "model.safetensors")
    del tensors[name]
    save_file(tensors if tensor is None else tensors | {name: tensor}, folder / "model.safetensors")


def with_value(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    def apply(tensor: torch.Tensor) -> torch.Tensor:
        tensor = tensor.clone()
        tensor.view(-1)[0] = value
        return tensor

    return apply


@mark.parametrize(
    ("name", "make", "part"),
    [
        ("fc.weight", lambda t: None, "fc.weight is missing"),
        ("layer1.0.bn1.running_mean", lambda t: None, "layer1.0.bn1.running_mean is missing"),
        ("fc.weight", lambda t: t[:9], "num_classes 10: expected 9, the number of rows of fc.weight"),
        ("fc.weight", lambda t: t[:, :5], "fc.weight is [10, 5], expected [10, 96]"),
        ("fc.weight", lambda t: t[0, 0], "fc.weight is [], expected [10, 96]"),
        ("conv1.0.weight", lambda t: t[..., 0], "conv1.0.weight is"),
        ("fc.weight", lambda t: t.to(torch.int8), "fc.weight in model.safetensors is of type I8"),
        ("fc.weight", lambda t: t.bool(), "is of type BOOL"),
        ("fc.weight", lambda t: t.to(torch.complex64), "is of type C64"),
        ("fc.weight", lambda t: t.to(torch.float8_e4m3fn), "is of type F8_E4M3"),
        ("fc.weight", lambda t: t.long(), "fc.weight is not of a floating-point type"),
        ("bn1.num_batches_tracked", lambda t: t.float(), "bn1.num_batches_tracked is of a floating-point type"),
        ("bn1.num_batches_tracked", lambda t: t - 10**6, "expected no negative numbers"),
        ("fc.weight", with_value(float("nan")), "fc.weight in model.safetensors contains NaN"),
        ("fc.bias", with_value(float("inf")), "fc.bias in model.safetensors contains inf"),
        ("conv1.0.weight", with_value(float("-inf")), "contains -inf"),
        ("fc.weight", with_value(1e38), "fc.weight in model.safetensors contains 1e+38"),
        ("bn1.running_mean", with_value(-1e25), "bn1.running_mean in model.safetensors contains -1e+25"),
        ("bn1.running_var", with_value(-0.5), "bn1.running_var in model.safetensors contains -0.5"),
        ("fc.weight", lambda t: with_value(1e300)(t.double()), "fc.weight in model.safetensors contains inf"),
    ],
)  # fmt: skip
def test_invalid_weights_are_refused_with_tensor_and_reason(
    folder: Path, name: str, make: Callable[[torch.Tensor], torch.Tensor | None], part: str
) -> None:
    changed = make(load_file(folder / "model.safetensors")[name])
    rewrite(folder, name, None if changed is None else changed.contiguous())
    assert part in refusal(folder)


def test_an_unexpected_tensor_is_refused(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors | {"fc2.\x1bweight": torch.zeros(2)}, folder / "model.safetensors")
    assert r"fc2.\x1bweight is unexpected" in refusal(folder)


def header_of(folder: Path) -> tuple[dict[str, Any], bytes]:
    data = (folder / "model.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def write_header(folder: Path, header: bytes, body: bytes, length: int | None = None) -> None:
    stated = struct.pack("<Q", len(header) if length is None else length)
    (folder / "model.safetensors").write_bytes(stated + header + body)


@mark.parametrize("content", [b"", b"1234", b"\xff" * 64, b"\x80\x02}q\x00.", b"PK\x03\x04" + b"0" * 100])
def test_a_file_that_is_not_safetensors_is_refused(folder: Path, content: bytes) -> None:
    (folder / "model.safetensors").write_bytes(content)
    assert "model.safetensors cannot be read" in refusal(folder)


def test_a_header_that_does_not_match_the_file_is_refused_before_allocating(folder: Path) -> None:
    header, body = header_of(folder)
    write_header(folder, json.dumps(header).encode(), body, length=2**63)
    assert "model.safetensors cannot be read" in refusal(folder)
    write_header(folder, json.dumps(header).encode(), body[:-4])
    assert "model.safetensors cannot be read" in refusal(folder)
    write_header(folder, json.dumps(header | {"fc.weight": {"dtype": "F32", "shape": [10**12, 96]}}).encode(), body)
    assert "model.safetensors cannot be read" in refusal(folder)
    overlapping = copy.deepcopy(header)
    overlapping["fc.weight"]["data_offsets"] = [0, 10 * 96 * 4]
    write_header(folder, json.dumps(overlapping).encode(), body)
    assert "model.safetensors cannot be read" in refusal(folder)


@mark.parametrize("kind", ["tensors", "metadata", "spaces", "a long name"])
def test_a_header_longer_than_that_of_any_model_is_refused_without_parsing(folder: Path, kind: str) -> None:
    entry = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    header: dict[str, Any] = {
        "tensors": {f"t{number}": entry for number in range(65_000)},
        "metadata": {"__metadata__": {"note": "x" * HEADER_BYTES}},
        "spaces": {},
        "a long name": {"x" * HEADER_BYTES: entry},
    }[kind]
    text = json.dumps(header).encode()
    write_header(folder, text + b" " * (HEADER_BYTES + 1 - len(text)), b"")
    begin = time.process_time()
    assert "model.safetensors cannot be read (it declares a header of" in refusal(folder)
    assert time.process_time() - begin < 0.5  # parsing alone takes longer


def test_a_header_of_many_tensors_is_compared_in_bounded_time(folder: Path) -> None:
    entry = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    text = json.dumps({f"t{number}": entry for number in range(20_000)}).encode()
    assert len(text) < HEADER_BYTES
    write_header(folder, text, b"")
    begin = time.process_time()
    assert "conv1.0.weight is missing; " in refusal(folder)
    assert time.process_time() - begin < 5


@mark.parametrize("size", [(32, 64), (64, 32)])
def test_a_model_of_images_that_are_not_square_predicts(folder: Path, size: tuple[int, int]) -> None:
    change(folder, pretrained_cfg__input_size=[3, *size])
    model = load(str(folder))
    assert model.input.input_size == (3, *size)
    image = folder.parent / "image.png"
    Image.effect_noise((50, 40), 90).convert("RGB").save(image)
    (found,) = predict(model, [image], batch_size=1, device=torch.device("cpu"))
    assert isinstance(found, Prediction)


def judge(folder: Path) -> str | None:
    """Load a folder; return the error message, or None."""
    try:
        load(str(folder))
    except RequestError as error:
        return str(error)
    return None


def test_mutated_folders_are_loaded_or_refused_in_one_line(folder: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    config = (folder / "config.json").read_bytes()
    header, body = header_of(folder)
    text = json.dumps(header).encode()
    loaded = 0
    for turn in range(60):
        # change a few bytes of the config or of the header
        data = bytearray(config if turn % 2 else text)
        for _ in range(int(rng.integers(1, 4))):
            data[int(rng.integers(len(data)))] = int(rng.integers(32, 127))
        if turn % 2:
            (folder / "config.json").write_bytes(data)
            write_header(folder, text, body)
        else:
            (folder / "config.json").write_bytes(config)
            write_header(folder, bytes(data), body)
        message = judge(folder)
        loaded += message is None
        assert message is None or message.isprintable()
    assert 0 < loaded < 60


@mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_floating_point_types_load_as_float32(folder: Path, dtype: torch.dtype) -> None:
    tensors = load_file(folder / "model.safetensors")
    converted = {name: t.to(dtype) if t.is_floating_point() else t for name, t in tensors.items()}
    save_file(converted, folder / "model.safetensors")
    for name, tensor in load(str(folder)).model.state_dict().items():
        assert torch.equal(tensor, converted[name].to(tensor.dtype)), name


def test_weights_without_the_counters_of_batch_norm_load(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    older = {name: tensor for name, tensor in tensors.items() if not name.endswith("num_batches_tracked")}
    save_file(older, folder / "model.safetensors")
    assert torch.equal(load(str(folder)).model.fc.weight, tensors["fc.weight"])


def test_loaded_tensors_equal_the_file_bit_for_bit_and_are_aligned(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    model = load(str(folder)).model
    assert not model.training
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, tensors[name]), name
        assert tensor.data_ptr() % 64 == 0, name


@mark.parametrize("prefix", ["timm_model.", "module."])
def test_weights_with_a_wrappers_prefix_load(folder: Path, prefix: str) -> None:
    tensors = load_file(folder / "model.safetensors")
    save_file({f"{prefix}{name}": tensor for name, tensor in tensors.items()}, folder / "model.safetensors")
    assert torch.equal(load(str(folder)).model.fc.weight, tensors["fc.weight"])


@mark.parametrize("names", [{str(n): f"kind {n}" for n in reversed(range(10))}, [f"kind {n}" for n in range(10)]])
def test_label_names_are_in_class_order(folder: Path, names: Any) -> None:
    change(folder, label_names=names)
    assert load(str(folder)).label_names == tuple(f"kind {n}" for n in range(10))


def test_two_classes_may_share_a_name_and_names_are_unchanged(folder: Path) -> None:
    names = ["crane", "crane", "\x1b[31mred", "a\nb", "\u202eevil", *NAMES[:5]]
    change(folder, label_names=names)
    assert load(str(folder)).label_names == tuple(names)


def test_the_config_layout_of_early_timm_loads(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    flat = {**config["pretrained_cfg"], "architecture": "test_resnet", "num_classes": 10, "labels": NAMES, "other": 1}
    (folder / "config.json").write_text(json.dumps(flat))
    model = load(str(folder))
    assert (model.label_names, model.input.input_size) == (tuple(NAMES), (3, 32, 32))


@mark.parametrize("name", ["run#1", "run?2", "a b", "50%", "ünï"])
def test_a_folder_name_with_special_characters_loads(folder: Path, name: str) -> None:
    moved = folder.rename(folder.parent / name)
    assert load(str(moved)).folder == moved
    source = find_model(f"local-dir:{moved}")
    assert build_model(source, NAMES).num_classes == 10


def test_a_model_folder_may_be_a_link(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "model").symlink_to(folder)
    assert load(str(tmp_path / "run")).folder == tmp_path / "run" / "model"


@mark.parametrize("classes", [2, 10, 17])
def test_a_model_saved_by_timm_starts_training_with_any_classes(written: Path, classes: int) -> None:
    source = find_model(f"local-dir:{written}")
    assert portable_architecture(source) == ("test_resnet", {})
    names = [f"class {number}" for number in range(classes)]
    model = build_model(source, names, drop_rate=0.2)
    tensors = load_file(written / "model.safetensors")
    assert model.fc.weight.shape[0] == classes
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, tensors[name]) == (not name.startswith("fc.")), name


def test_a_classifier_is_kept_if_the_class_names_match(written: Path) -> None:
    source = find_model(f"local-dir:{written}")
    weight = load_file(written / "model.safetensors")["fc.weight"]
    assert torch.equal(build_model(source, NAMES).fc.weight, weight)
    assert source.saved.classifier_for(NAMES) == "kept"
    order = [3, 1, 0, 2, 9, 8, 7, 6, 5, 4]
    assert torch.equal(build_model(source, [NAMES[n] for n in order]).fc.weight, weight[order])
    assert "reordered to match the class names" in source.saved.classifier_for([NAMES[n] for n in order])
    assert not torch.equal(build_model(source, [*NAMES[:9], "other"]).fc.weight, weight)
    assert "new, because the pretrained model has different class names" in source.saved.classifier_for(
        [*NAMES[:9], "other"]
    )


def test_a_variant_saved_by_timm_is_recognized(tmp_path: Path) -> None:
    args = {"num_classes": 10, "in_chans": 3, "global_pool": "avg", "cardinality": 8, "base_width": 14}
    config = {"architecture": "resnext50_32x4d", "num_classes": 10, "pretrained_cfg": {}, "model_args": args}
    (tmp_path / "config.json").write_text(json.dumps(config))
    source = find_model(f"local-dir:{tmp_path}", pretrained=False)
    variant = variant_of(source)
    assert variant is not None
    assert variant.name == "resnext_g8"
    assert portable_architecture(source) == ("resnext50_32x4d", {"cardinality": 8, "base_width": 14})


def test_grayscale_models_and_other_arguments_load(tmp_path: Path) -> None:
    from timm.models._hub import save_for_hf

    torch.manual_seed(0)
    saved = timm.create_model("test_resnet", num_classes=3, in_chans=1, stem_width=16, act_layer="silu").eval()
    data = {"input_size": (1, 32, 32), "mean": (0.5,), "std": (0.5,)}
    save_for_hf(saved, tmp_path / "model", safe_serialization=True, data_config=data)
    model = load(str(tmp_path / "model"))
    assert model.input.input_size == (1, 32, 32)
    images = torch.randn(2, 1, 32, 32)
    with torch.inference_mode():
        assert torch.equal(model.model(images), saved(images))


def test_a_model_larger_than_memory_is_refused_before_building(folder: Path) -> None:
    change(folder, architecture="resnext101_32x8d", model_args={"cardinality": 1024, "base_width": 1024})
    with raises(RequestError, match=r"needs .* GB of memory, but this machine has only"):
        find_model(f"local-dir:{folder}", pretrained=False)


def test_nothing_outside_the_cache_is_removed(tmp_path: Path) -> None:
    snapshot = tmp_path / "cache" / "models--me--model" / "snapshots" / "abc"
    blobs = snapshot.parent.parent / "blobs"
    for place in (snapshot, blobs):
        place.mkdir(parents=True)
    outside, blob = tmp_path / "victim", blobs / "123"
    for file in (outside, blob):
        file.write_text("kept")
    forget(snapshot / ".." / ".." / ".." / ".." / "victim")
    forget(outside)
    (snapshot / "linked").symlink_to(outside)
    forget(snapshot / "linked")
    assert outside.read_text() == "kept"
    assert not (snapshot / "linked").is_symlink()
    (snapshot / "model.safetensors").symlink_to(blob)
    forget(snapshot / "model.safetensors")
    assert not blob.exists()
    assert list(snapshot.iterdir()) == []


def test_without_the_hub_errors_suggest_alternatives_that_work() -> None:
    for pretrained in (True, False):
        with raises(RunError) as caught:
            find_model("hf-hub:nobody/nothing", pretrained)
        message = str(caught.value)
        assert "model=hf-hub:nobody/nothing: config.json of nobody/nothing is not in the cache" in message
        assert "the Hub could not be reached" in message
        assert message.endswith("try again later, or use a model folder or a name")
    with raises(RunError, match="or start from random weights with pretrained=False"):
        find_model("resnext_g32", True)


INVALID_REVISIONS = ["", "../../x", "a//b", "refs/", "-x", "a b", "\x1b[31m", "\ud800", "r" * 300]


@mark.parametrize("revision", INVALID_REVISIONS)
def test_an_invalid_revision_is_refused_without_contacting_the_hub(revision: str) -> None:
    with raises(RequestError, match="after @ is not a valid revision: expected a branch, tag or commit") as caught:
        find_model(f"hf-hub:me/model@{revision}")
    assert str(caught.value).isprintable()


@mark.parametrize("verify", [True, False])
@mark.parametrize("revision", [*INVALID_REVISIONS, "../../../../tmp/zz", 5, b"main", ["main"]])
def test_from_hub_refuses_an_invalid_revision(revision: Any, verify: bool) -> None:
    with raises(
        RequestError, match=r"me/model: revision=.* is not a valid revision: expected a branch, tag or commit"
    ) as caught:
        from_hub("me/model", revision=revision, verify=verify)
    assert str(caught.value).isprintable()


@mark.parametrize("verify", [True, False])
@mark.parametrize(
    "repo_id", ["", " ", None, 5, Path("me/model"), "a/b/c", "../x", "me/x@main", "me/" + "x" * 500, "\0"]
)
def test_from_hub_refuses_an_invalid_repository_id(repo_id: Any, verify: bool) -> None:
    with raises(RequestError, match="is not a Hub ID of the form owner/name") as caught:
        from_hub(repo_id, verify=verify)
    assert str(caught.value).isprintable()


@mark.parametrize("revision", ["main", "v1.0", "refs/pr/1", "a" * 40, "user@fix/1"])
def test_branches_tags_and_commits_are_valid_revisions(revision: str) -> None:
    with raises(RunError, match="the Hub could not be reached"):
        find_model(f"hf-hub:me/model@{revision}")


@mark.parametrize("name", ["a" * 5000, "a/" * 5000, "\0", "~nobody/x"], ids=["long", "deep", "null", "home"])
def test_an_invalid_path_is_refused_like_a_missing_one(name: str) -> None:
    with raises(RequestError, match="is not a trained model"):
        load(name)


@mark.parametrize(
    ("name", "close"),
    [
        ("resnext50", "resnext_g32, resnext50_32x4d"),
        ("ResNeXt-50", "resnext_g32, resnext50_32x4d"),
        ("resnext", "resnext_g32, "),
        ("resnext101", "resnext101_g1, resnext101_g2"),
        ("resnet-50", "resnet50"),
    ],
)
def test_variants_are_suggested_first_for_unknown_names(name: str, close: str) -> None:
    with raises(RequestError, match=f"no such model; closest matches: {close}"):
        find_model(name)


def test_saved_models_do_not_use_timms_loading(written: Path, monkeypatch: MonkeyPatch) -> None:
    for module in (timm.models._builder, timm.models._hub, timm.models._factory):
        for name in ("load_pretrained", "load_state_dict_from_hf", "load_state_dict", "load_checkpoint"):
            monkeypatch.delattr(module, name, raising=False)
    monkeypatch.delattr(torch, "load")
    assert read_model("it", written / "config.json", written / "model.safetensors").load().num_classes == 10
    assert build_model(find_model(f"local-dir:{written}"), 4).num_classes == 4

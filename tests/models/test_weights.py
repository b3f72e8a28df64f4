"""`load_weights` reads state dicts and files of other libraries, and names tensors that do not match."""

import pickle
from collections.abc import Mapping
from pathlib import Path

import timm
import torch
import torchvision
from pytest import fixture, mark, raises
from safetensors.torch import save_file

from resnext_hub import load_weights


@fixture(scope="module")
def theirs() -> dict[str, torch.Tensor]:
    torch.manual_seed(5)
    return timm.create_model("resnext50_32x4d", num_classes=7).state_dict()


def ours(num_classes: int = 7, **kwargs: int) -> torch.nn.Module:
    return timm.create_model("resnext_g32", num_classes=num_classes, **kwargs)


def equal(model: torch.nn.Module, state_dict: Mapping[str, torch.Tensor]) -> bool:
    return all(
        torch.equal(tensor, state_dict[name]) for name, tensor in model.state_dict().items() if name in state_dict
    )


@mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod.", "timm_model.", "model."])
@mark.parametrize("container", [None, "state_dict", "model"])
def test_a_file_loads_with_any_container_or_prefix(
    theirs: dict[str, torch.Tensor], tmp_path: Path, prefix: str, container: str | None
) -> None:
    wrapped = {prefix + key: tensor for key, tensor in theirs.items()}
    torch.save(wrapped if container is None else {container: wrapped, "epoch": 3}, tmp_path / "weights.pth")
    model = ours()
    assert not equal(model, theirs)
    load_weights(model, tmp_path / "weights.pth")
    assert equal(model, theirs)


def test_averaged_weights_are_preferred(theirs: dict[str, torch.Tensor], tmp_path: Path) -> None:
    raw = {key: torch.zeros_like(tensor) for key, tensor in theirs.items()}
    torch.save({"state_dict": raw, "state_dict_ema": theirs}, tmp_path / "weights.pth")
    model = ours()
    load_weights(model, tmp_path / "weights.pth")
    assert equal(model, theirs)


def test_a_safetensors_file_and_a_state_dict_load(theirs: dict[str, torch.Tensor], tmp_path: Path) -> None:
    save_file(theirs, tmp_path / "model.safetensors")
    for source in (str(tmp_path / "model.safetensors"), theirs):
        model = ours()
        load_weights(model, source)
        assert equal(model, theirs)


def test_torchvisions_state_dict_loads_with_and_without_counters() -> None:
    theirs = torchvision.models.resnext50_32x4d(num_classes=7).state_dict()
    old = {key: tensor for key, tensor in theirs.items() if not key.endswith("num_batches_tracked")}
    for source in (theirs, old):
        model = ours()
        load_weights(model, source)
        assert equal(model, theirs)


def test_mismatched_tensors_are_named_with_both_shapes_and_nothing_is_loaded(theirs: dict[str, torch.Tensor]) -> None:
    model = ours(num_classes=5, in_chans=1)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with raises(ValueError, match="the weights do not match the model") as caught:
        load_weights(model, {**theirs, "extra.weight": torch.zeros(2, 3)})
    message = str(caught.value)
    assert "conv1.weight: (64, 3, 7, 7) in the weights, (64, 1, 7, 7) in the model" in message
    assert "fc.weight: (7, 2048) in the weights, (5, 2048) in the model" in message
    assert "extra.weight (2, 3): not in the model" in message
    assert equal(model, before)
    with raises(ValueError, match=r"layer1\.0\.conv1\.weight \(128, 64, 1, 1\): not in the weights"):
        load_weights(ours(), {key: t for key, t in theirs.items() if key != "layer1.0.conv1.weight"})


def test_the_classifier_can_be_kept(theirs: dict[str, torch.Tensor]) -> None:
    model = ours(num_classes=5)
    classifier = model.fc.weight.clone()
    load_weights(model, theirs, skip_classifier=True)
    assert torch.equal(model.fc.weight, classifier)
    assert torch.equal(model.conv1.weight, theirs["conv1.weight"])


class Payload:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (print, ("unpickled",))


def test_a_pickle_with_more_than_tensors_is_not_unpickled(tmp_path: Path, capsys) -> None:
    for name, write in (
        ("a.pth", torch.save),
        ("b.pth", lambda x, path: path.write_bytes(pickle.dumps(x, protocol=2))),
    ):
        write({"weight": Payload()}, tmp_path / name)
        with raises(ValueError, match="contains objects other than tensors"):
            load_weights(ours(), tmp_path / name)
    assert "unpickled" not in capsys.readouterr().out
    with raises(FileNotFoundError, match="there is no weights file"):
        load_weights(ours(), tmp_path / "nowhere.pth")

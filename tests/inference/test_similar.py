"""`similar` finds the same images as an exhaustive comparison, and refuses the embeddings of another model."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow
from pyarrow import parquet
from pytest import fixture, mark, raises
from safetensors.torch import load_file, save_file

import resnext_hub
from resnext_hub.errors import RequestError
from resnext_hub.inference.similar import Embeddings

Command = Callable[..., tuple[int, str, str]]


@fixture(scope="module")
def images(vehicles_run: Path) -> Path:
    return vehicles_run.parent / "vehicles" / "validation"


@mark.parametrize("top", [1, 7, 300, 500])
def test_the_search_is_exact(top: int) -> None:
    generator = np.random.default_rng(0)
    vectors = generator.normal(size=(300, 16)).astype(np.float32)
    vectors[200:210] = 2 * vectors[100]  # the same direction
    vectors[5] = 0
    query = vectors[100] + 0.1 * vectors[7]
    found = Embeddings(range(300), vectors).nearest(query, top)
    lengths = np.linalg.norm(vectors.astype(np.float64), axis=1) * np.linalg.norm(query)
    cosines = vectors.astype(np.float64) @ query / np.where(lengths > 0, lengths, 1)
    expected = np.argsort(-cosines.round(5), kind="stable")[:top]
    assert [match.image for match in found] == expected.tolist()
    np.testing.assert_allclose([match.similarity for match in found], cosines[expected], atol=1e-6)


def test_a_folder_and_stored_embeddings_give_the_same_images_without_the_image_itself(
    vehicles_run: Path, images: Path, command: Command, tmp_path: Path
) -> None:
    own = sorted((images / "car").glob("*.png"))[0]
    code, out, err = command("similar", vehicles_run, own, "--in", images, "--top", 5)
    assert code == 0, err
    assert "005-broken.png: cannot be decoded" in err
    assert command("predict", vehicles_run, images, "--embed", tmp_path / "found.parquet")[0] == 1  # one is broken
    code, stored, err = command("similar", vehicles_run, own, "--in", tmp_path / "found.parquet", "--top", 5, "--json")
    assert code == 0, err
    rows = [json.loads(line) for line in stored.splitlines()]
    assert out == "".join(f"{row['path']}\t{row['similarity']:.4f}\n" for row in rows)
    assert len(rows) == 5
    assert str(own) not in {row["path"] for row in rows}

    classifier = resnext_hub.load(vehicles_run)
    from_file = classifier.similar(own, tmp_path / "found.parquet", top=5)
    assert [(match.image, match.similarity) for match in from_file] == [(r["path"], r["similarity"]) for r in rows]
    others = [path for path in sorted(images.rglob("*.png")) if "broken" not in path.name]
    from_images = classifier.similar(own, others, top=5)
    # embeddings of another batch size may differ in the last bits
    np.testing.assert_allclose([m.similarity for m in from_images], [m.similarity for m in from_file], atol=1e-5)


def test_embeddings_of_another_model_are_refused_by_name(
    vehicles_run: Path, images: Path, command: Command, tmp_path: Path
) -> None:
    file = tmp_path / "found.parquet"
    command("predict", vehicles_run, images / "bus", "--embed", file)
    metadata = json.loads(parquet.read_schema(file).metadata[b"resnext_hub"])
    assert metadata["model"] == "run/model"  # without the folders above it
    own = next((images / "bus").glob("*.png"))

    other = Path(shutil.copytree(vehicles_run / "model", tmp_path / "other"))
    weights = load_file(other / "model.safetensors")
    name = next(name for name in weights if name.endswith("conv1.weight"))
    save_file(weights | {name: weights[name] * 1.5}, other / "model.safetensors", metadata={"format": "pt"})
    code, out, err = command("similar", other, own, "--in", file)
    assert (code, out) == (2, "")
    assert f"contains embeddings of run/model (SHA-256 {metadata['weights'][:12]}), but the model is other" in err
    assert "with different weights" in err

    resized = Path(shutil.copytree(vehicles_run / "model", tmp_path / "resized"))
    config = json.loads((resized / "config.json").read_text())
    config["pretrained_cfg"]["crop_pct"] = 0.5
    (resized / "config.json").write_text(json.dumps(config))
    code, _, err = command("similar", resized, own, "--in", file)
    assert code == 2
    assert "with different preprocessing" in err


def test_a_file_that_predict_did_not_write_is_one_line(
    vehicles_run: Path, images: Path, command: Command, tmp_path: Path
) -> None:
    own = next((images / "bus").glob("*.png"))
    file = tmp_path / "found.parquet"
    command("predict", vehicles_run, images / "bus", "--embed", file)
    table = parquet.read_table(file)
    metadata = table.schema.metadata
    short = pyarrow.table({"path": ["a"], "embedding": pyarrow.array([[1.0]], pyarrow.list_(pyarrow.float32()))})
    for content, expected in (
        (table.replace_schema_metadata(None), "does not record which model computed its embeddings"),
        (table.select(["path"]).replace_schema_metadata(metadata), "cannot be read"),
        (short.replace_schema_metadata(metadata), "cannot be read"),
    ):
        parquet.write_table(content, file)
        code, out, err = command("similar", vehicles_run, own, "--in", file)
        assert (code, out) == (2, "")
        assert expected in err
        assert len(err.strip().splitlines()) == 1
    for bad, expected in (
        (own, "cannot be read"),
        (tmp_path / "none", "No such file"),
        (tmp_path, "contains no images"),
    ):
        code, _, err = command("similar", vehicles_run, own, "--in", bad)
        assert code == 2
        assert expected in err, err
    classifier = resnext_hub.load(vehicles_run)
    assert classifier.similar(own, []) == []
    with raises(RequestError, match="top=0"):
        classifier.similar(own, [own], top=0)
    with raises(RequestError, match="an optimized model has no embeddings"):
        classifier.optimize([own], compile=False).similar(own, file)

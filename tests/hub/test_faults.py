"""Faults during a push: the repository is complete, or unchanged with a clear error."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

from pytest import fixture, mark
from support.client import Client
from support.loopback_hub import Fault, LoopbackHub, serve
from support.processes import ROOT, run_process

WORDS = ("--license", "mit")


@fixture(scope="module")
def running(tmp_path_factory) -> Iterator[tuple[LoopbackHub, Client]]:
    with serve() as hub:
        client = Client(hub, tmp_path_factory.mktemp("home"))
        yield hub, client
        client.close()


@fixture
def hub(running: tuple[LoopbackHub, Client]) -> LoopbackHub:
    """Return the Hub of this module, emptied."""
    hub = running[0]
    hub.repos.clear()
    hub.blobs.clear()
    hub.faults.clear()
    hub.requests.clear()
    return hub


@fixture
def client(running: tuple[LoopbackHub, Client]) -> Client:
    return running[1]


def holds(hub: LoopbackHub, finished: Path, branch: str = "main") -> None:
    """Check that a repository contains the complete model, in one commit of ours."""
    repo = hub.repos["models/me/digits"]
    assert [len(commit.files) > 0 for commit in repo.branches[branch]] == [False, True]
    files = repo.branches[branch][-1].files
    for path in (finished / "model").rglob("*"):
        name = path.relative_to(finished / "model").as_posix()
        if path.is_file() and name not in ("README.md", "config.json"):
            assert files[name] == path.read_bytes(), name
    assert "license: mit" in files["README.md"].decode()


@mark.parametrize(
    ("pattern", "kind", "times"),
    [
        ("POST /api/repos/create", "503", 2),
        ("POST /api/repos/create", "lost reply", 1),
        ("POST .*preupload", "503", 2),
        ("POST .*info/lfs/objects/batch", "reset", 1),
        ("PUT /lfs/", "reset", 1),
        ("POST /lfs-verify", "503", 1),
        ("POST .*/commit/", "503", 2),
        ("POST .*/commit/", "429", 1),
        ("POST .*/commit/", "lost reply", 1),
        ("POST .*/commit/", "lost reply", 3),
        ("GET .*/tree/", "truncated", 1),
        ("GET .*/resolve/.*README", "slow", 1),
    ],
)
def test_a_transient_fault_leaves_one_complete_commit(
    hub: LoopbackHub, client: Client, finished: Path, pattern: str, kind: str, times: int
) -> None:
    hub.faults.append(Fault(pattern, kind, times))
    code, out, err = client.command("push", finished, "--repo-id", "me/digits", *WORDS)
    assert code == 0, err
    assert hub.faults[0].times < times, "the fault was not triggered"
    assert "published and verified: http" in out
    holds(hub, finished)


@mark.parametrize(
    ("pattern", "kind", "message"),
    [
        ("POST .*/commit/", "503", "me/digits could not be published"),
        ("POST .*/commit/", "507", "asked to fail with 507"),
        ("PUT /lfs/", "507", "me/digits could not be published"),
    ],
)
def test_a_permanent_fault_is_reported_and_rerunning_succeeds_later(
    hub: LoopbackHub, client: Client, finished: Path, pattern: str, kind: str, message: str
) -> None:
    hub.faults.append(Fault(pattern, kind, 1000))
    code, _, err = client.command("push", finished, "--repo-id", "me/digits", *WORDS)
    assert code == 1
    assert message in err
    assert f"The model is kept in {finished / 'model'}; rerun the same command to publish it" in err
    assert "Traceback" not in err
    assert [commit.files for commit in hub.repos["models/me/digits"].commits] == [{}]
    hub.faults.clear()
    code, _, err = client.command("push", finished, "--repo-id", "me/digits", *WORDS)
    assert code == 0, err
    holds(hub, finished)


def test_a_repeated_push_creates_no_second_commit(hub: LoopbackHub, client: Client, finished: Path) -> None:
    words = ("push", finished, "--repo-id", "me/digits", *WORDS)
    assert client.command(*words)[0] == 0
    code, out, err = client.command(*words)
    assert code == 0, err
    assert "already up to date" in out
    holds(hub, finished)
    code, out, _ = client.command("push", finished, "--repo-id", "me/digits", "--license", "apache-2.0")
    assert code == 0
    assert "published and verified" in out
    assert len(hub.repos["models/me/digits"].commits) == 3


def test_other_files_of_the_repository_are_kept(hub: LoopbackHub, client: Client, finished: Path) -> None:
    hub.create("models", "me/digits").commit("mine", {"notes.txt": b"keep this"})
    assert client.command("push", finished, "--repo-id", "me/digits", *WORDS)[0] == 0
    assert hub.repos["models/me/digits"].commits[-1].files["notes.txt"] == b"keep this"


@mark.parametrize("kind", [None, "lost reply", "503"])
def test_a_pull_request_is_opened_once(hub: LoopbackHub, client: Client, finished: Path, kind: str | None) -> None:
    if kind:
        hub.faults.append(Fault("POST .*/commit/", kind, 1))
    words = ("push", finished, "--repo-id", "me/digits", "--create-pr", *WORDS)
    for _ in range(2):
        code, out, err = client.command(*words)
        assert code == 0, err
        assert "/discussions/1" in out
    repo = hub.repos["models/me/digits"]
    assert len(repo.pulls) == 1
    assert [commit.files for commit in repo.commits] == [{}]
    assert set(repo.branches["refs/pr/1"][-1].files) >= {"model.safetensors", "README.md", "config.json"}


def test_push_to_a_branch_of_an_organization(hub: LoopbackHub, client: Client, finished: Path) -> None:
    code, _, err = client.command("push", finished, "--repo-id", "club/digits", "--revision", "tuned", *WORDS)
    assert code == 0, err
    repo = hub.repos["models/club/digits"]
    assert [commit.files for commit in repo.commits] == [{}]
    assert "model.safetensors" in repo.branches["tuned"][-1].files


@mark.parametrize(
    ("token", "message"),
    [
        ("hf_readonlytokenofme", "permission denied: the token cannot write there"),
        (
            "hf_unknownunknownunknown",
            "the token is missing or invalid; log in with `hf auth login`",
        ),
    ],
)
def test_missing_permission_is_reported_without_the_token(
    hub: LoopbackHub, finished: Path, tmp_path: Path, token: str, message: str
) -> None:
    client = Client(hub, tmp_path, token)
    code, out, err = client.command("push", finished, "--repo-id", "me/digits", *WORDS)
    client.close()
    assert code == 1
    assert message in err
    assert token not in out + err
    assert hub.repos == {}


def test_corrupted_uploads_are_detected(hub: LoopbackHub, client: Client, finished: Path) -> None:
    hub.faults.append(Fault("GET .*/resolve/.*/config.json", "wrong bytes", 1000))
    code, _, err = client.command("push", finished, "--repo-id", "me/digits", *WORDS)
    assert code == 1
    assert "me/digits: the upload differs from the local files (config.json)" in err


FROM_HUB = """
import resnext_hub, torch
from PIL import Image
try:
    loaded = resnext_hub.from_hub("me/digits", revision={revision!r})
    image = loaded.transform(Image.new("RGB", (20, 20), (90, 120, 200)))
    with torch.inference_mode():
        logits = loaded.model(image[None])
    result = [loaded.revision, list(loaded.label_names), logits.tolist()]
except (ValueError, RuntimeError) as error:
    result = f"{{type(error).__name__}}: {{error}}"
"""


def test_from_hub_returns_model_transform_labels_and_commit(hub: LoopbackHub, client: Client, finished: Path) -> None:
    import timm
    import torch
    from PIL import Image

    assert client.command("push", finished, "--repo-id", "me/digits", *WORDS)[0] == 0
    answer = client.run(FROM_HUB.format(revision=None))
    assert answer["code"] == 0, answer["err"]
    revision, labels, logits = answer["result"]
    assert revision == hub.repos["models/me/digits"].commits[-1].oid
    assert labels == [str(n) for n in range(10)]
    model = timm.create_model(f"local-dir:{finished / 'model'}", pretrained=True).eval()
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)
    with torch.inference_mode():
        expected = model(transform(Image.new("RGB", (20, 20), (90, 120, 200)))[None])
    assert logits == expected.tolist()


@mark.parametrize("name", ["model.safetensors", "config.json"])
def test_from_hub_rejects_a_corrupted_file_and_downloads_it_again(
    hub: LoopbackHub, client: Client, finished: Path, name: str
) -> None:
    assert client.command("push", finished, "--repo-id", "me/digits", *WORDS)[0] == 0
    repo = hub.repos["models/me/digits"]
    repo.commit("another", repo.commits[-1].files | {"note.txt": name.encode()})  # a revision that is not cached
    large = name == "model.safetensors"
    hub.faults.append(Fault("GET /cdn/" if large else f"GET .*/resolve/.*/{name}", "wrong bytes", 1))
    answer = client.run(
        "import shutil, huggingface_hub.constants as c; shutil.rmtree(c.HF_HUB_CACHE, ignore_errors=True)\n"
        + FROM_HUB.format(revision=None)
    )
    assert f"{name} of me/digits does not match its hash on the Hub" in answer["result"], answer
    answer = client.run(FROM_HUB.format(revision=None))
    assert answer["result"][0] == repo.commits[-1].oid


def test_from_hub_rejects_pickles_unknown_revisions_and_gated_repositories(
    hub: LoopbackHub, client: Client, finished: Path
) -> None:
    files = {"config.json": (finished / "model" / "config.json").read_bytes(), "pytorch_model.bin": b"a pickle"}
    hub.create("models", "me/digits").commit("pickled", files)
    error = client.run(FROM_HUB.format(revision=None))["result"]
    assert error == "RequestError: me/digits has no model.safetensors; pickled weights are not loaded"
    error = client.run(FROM_HUB.format(revision="v9"))["result"]
    assert error == "RequestError: me/digits has no revision v9"
    hub.repos["models/me/digits"].private = True
    hub.repos["models/you/digits"] = hub.repos.pop("models/me/digits")
    error = client.run(FROM_HUB.format(revision=None).replace("me/digits", "you/digits"))["result"]
    assert "repository you/digits does not exist" in error
    hub.repos["models/you/digits"].private = False
    hub.repos["models/you/digits"].granted = set()
    hub.repos["models/you/digits"].commit("weights", files | {"model.safetensors": b"x"})
    error = client.run(FROM_HUB.format(revision=None).replace("me/digits", "you/digits"))["result"]
    assert "you/digits is gated: request access on its page" in error


def test_only_the_verified_file_is_loaded_from_the_hub(hub: LoopbackHub, client: Client, finished: Path) -> None:
    config = json.loads((finished / "model" / "config.json").read_bytes())
    weights = (finished / "model" / "model.safetensors").read_bytes()
    names = {str(number): f"kind {number}" for number in range(10)}
    files = {"model.safetensors": weights, "pytorch_model.bin": b"a pickle", "evil.safetensors": b"evil"}
    repo = hub.create("models", "me/digits")
    repo.commit("named", files | {"config.json": json.dumps(config | {"label_names": names}).encode()})
    revision, labels, _ = client.run(FROM_HUB.format(revision=None))["result"]
    assert (revision, labels) == (repo.commits[-1].oid, [f"kind {number}" for number in range(10)])
    assert not [request for request in hub.requests if "pytorch_model" in request or "evil" in request]
    for name in ("evil.safetensors", "pytorch_model.bin"):
        config["pretrained_cfg"]["hf_hub_filename"] = name
        repo.commit("hostile", files | {"config.json": json.dumps(config).encode()})
        error = client.run(FROM_HUB.format(revision=None))["result"]
        stated = f'me/digits: config.json has pretrained_cfg.hf_hub_filename "{name}": not allowed'
        assert error.startswith(f"RequestError: {stated}")
        for words in (
            ("predict", "hf-hub:me/digits", ROOT / "docs" / "quickstart.png"),
            ("train", "--model", "hf-hub:me/digits"),
        ):
            code, _, err = client.command(*words)
            assert code == 2, err
            assert stated in err
    assert not [request for request in hub.requests if "pytorch_model" in request or "evil" in request]


def test_no_token_appears_at_the_highest_verbosity(hub: LoopbackHub, finished: Path, tmp_path: Path) -> None:
    token = "hf_loopbacktokenofme"
    hub.faults.append(Fault("POST .*/commit/", "507", 1000))
    environment = hub.environment() | {"HF_HOME": str(tmp_path), "HF_HUB_VERBOSITY": "debug"}
    words = ("scripts/push.py", finished, "--repo-id", "me/digits", *WORDS)
    done = run_process(*words, **environment)
    assert done.returncode == 1
    assert token not in done.stdout + done.stderr
    for path in finished.rglob("*"):
        if path.is_file():
            assert token.encode() not in path.read_bytes()
    commits = hub.repos["models/me/digits"].commits
    assert not re.search(r"hf_\w+", json.dumps([commit.message for commit in commits]))


def card_of(hub: LoopbackHub) -> str:
    return hub.repos["models/me/digits"].commits[-1].files["README.md"].decode()


def edit_on_the_web(hub: LoopbackHub, card: str) -> None:
    repo = hub.repos["models/me/digits"]
    repo.commit("Update README.md", repo.commits[-1].files | {"README.md": card.encode()})


def test_edits_on_the_web_survive_the_next_push(hub: LoopbackHub, client: Client, finished: Path) -> None:
    words = ("push", finished, "--repo-id", "me/digits")
    assert client.command(*words, "--license", "mit")[0] == 0
    mine = "\n## How I use it\n\n![my image](https://example.org/a.png)\n"
    edit_on_the_web(hub, card_of(hub).replace("\nlicense: mit\n", "\nlicense: mit\nlanguage: no  # mine\n") + mine)
    code, out, err = client.command(*words, "--license", "mit")
    assert (code, "already up to date" in out) == (0, False), err  # not identical: the order of the metadata differs
    assert "language: no  # mine\n" in card_of(hub)
    hub.faults.append(Fault("POST .*/commit/", "lost reply", 1))
    assert client.command(*words, "--license", "apache-2.0")[0] == 0
    assert card_of(hub).endswith(mine)
    assert "language: no  # mine\n" in card_of(hub)
    assert "license: apache-2.0\n" in card_of(hub)
    code, out, _ = client.command(*words, "--license", "apache-2.0")
    assert (code, "already up to date" in out) == (0, True)


@mark.parametrize("place", ["here", "there"])
def test_an_edited_generated_part_is_replaced_only_with_overwrite_card(
    hub: LoopbackHub, client: Client, finished: Path, place: str
) -> None:
    words = ("push", finished, "--repo-id", "me/digits", *WORDS)
    assert client.command(*words)[0] == 0
    path = finished / "model" / "README.md"
    before = path.read_text()
    if place == "here":
        path.write_text(before.replace("## Limitations\n", "## Limitations\n\nMine.\n"))
    else:
        edit_on_the_web(hub, card_of(hub).replace("## Limitations\n", "## Limitations\n\nMine.\n"))
    commits = len(hub.repos["models/me/digits"].commits)
    code, _, err = client.command(*words)
    assert code == 2
    assert len(hub.repos["models/me/digits"].commits) == commits
    assert "was edited inside its generated part; nothing was uploaded" in err
    assert err.count("error: ") == 1
    if place == "there":
        assert "\n-Mine.\n" in err  # the edit that would be lost
    assert client.command(*words, "--overwrite-card")[0] == 0
    assert "Mine." not in card_of(hub)
    path.write_text(before)


def test_a_foreign_card_is_replaced_only_with_overwrite_card(hub: LoopbackHub, client: Client, finished: Path) -> None:
    hub.create("models", "me/digits").commit("mine", {"README.md": b"# My own card\n"})
    words = ("push", finished, "--repo-id", "me/digits", *WORDS)
    code, _, err = client.command(*words)
    assert code == 2
    assert "the README.md on the Hub was not generated by push; nothing was uploaded" in err
    assert "-# My own card" in err
    assert card_of(hub) == "# My own card\n"
    hub.repos["models/me/digits"].commit("odd", {"README.md": b"\xff" * 9})
    assert client.command(*words)[0] == 2
    assert client.command(*words, "--overwrite-card")[0] == 0
    assert "license: mit" in card_of(hub)

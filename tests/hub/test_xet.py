"""Publishing and loading over Xet, the Hub's transfer of large files, keep the same promises as over plain LFS."""

import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import timm
import torch
from pytest import fixture, mark
from safetensors.torch import save_file
from support import warm_start
from support.client import Client
from support.loopback_hub import Fault, LoopbackHub, serve
from support.loopback_xet import TOKEN as XET_TOKEN
from support.processes import run_process

PUSH = ("--repo-id", "me/cars", "--license", "mit")


@fixture(scope="module")
def home(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("home")


@fixture(scope="module")
def running(home: Path) -> Iterator[tuple[LoopbackHub, Client]]:
    with serve() as hub:
        client = Client(hub, home, xet=True)
        yield hub, client
        client.close()


@fixture
def hub(running: tuple[LoopbackHub, Client], home: Path) -> LoopbackHub:
    """Return the Hub of this module, emptied, with empty client caches."""
    hub = running[0]
    for state in (hub.repos, hub.blobs, hub.faults, hub.requests):
        state.clear()
    hub.xet.clear()
    for cache in ("hub", "xet"):
        shutil.rmtree(home / cache, ignore_errors=True)
    return hub


@fixture
def client(running: tuple[LoopbackHub, Client]) -> Client:
    return running[1]


def holds(hub: LoopbackHub, run: Path) -> None:
    """Check that a repository contains the complete model in one commit of ours, uploaded over Xet."""
    repo = hub.repos["models/me/cars"]
    assert [len(commit.files) > 0 for commit in repo.commits] == [False, True]
    assert repo.commits[-1].files["model.safetensors"] == (run / "model" / "model.safetensors").read_bytes()
    assert "license: mit" in repo.commits[-1].files["README.md"].decode()
    over_xet(hub, "POST /cas/v2/shards")


def over_xet(hub: LoopbackHub, *requests: str) -> None:
    """Check that these requests were made, and no request of plain LFS."""
    for request in requests:
        assert any(made.startswith(request) for made in hub.requests), (request, hub.requests)
    assert not [made for made in hub.requests if "lfs" in made or "/cdn/" in made]


def test_a_push_over_xet_is_one_commit_and_is_read_back(hub: LoopbackHub, client: Client, vehicles_run: Path) -> None:
    code, out, err = client.command("push", vehicles_run, *PUSH)
    assert code == 0, err
    assert "published and verified: http" in out
    holds(hub, vehicles_run)
    over_xet(hub, "GET /api/models/me/cars/xet-write-token", "POST /cas/v1/xorb-grants", "PUT /xorb-uploads")
    listed = client.run(
        "from huggingface_hub import HfApi\n"
        "files = HfApi().list_repo_tree('me/cars')\n"
        "result = {file.path: [file.lfs.sha256, file.xet_hash] for file in files if getattr(file, 'lfs', None)}"
    )["result"]
    assert listed == {"model.safetensors": [digest for hashes in hub.xet.hashes.items() for digest in hashes]}


def test_a_push_works_with_version_1_of_the_xet_api(hub: LoopbackHub, client: Client, vehicles_run: Path) -> None:
    for route in ("POST /cas/v1/xorb-grants", "POST /cas/v2/", "GET /cas/v2/"):
        hub.faults.append(Fault(route, "404", 1000))
    assert client.command("push", vehicles_run, *PUSH)[0] == 0
    holds(hub, vehicles_run)
    assert client.run(FROM_HUB)["result"][0] == hub.repos["models/me/cars"].commits[-1].oid
    over_xet(hub, "POST /cas/v1/xorbs", "POST /cas/v1/shards", "GET /cas/v1/reconstructions")


def test_a_repeated_push_creates_no_second_commit(hub: LoopbackHub, client: Client, vehicles_run: Path) -> None:
    for message in ("published and verified", "already up to date"):
        code, out, err = client.command("push", vehicles_run, *PUSH)
        assert code == 0, err
        assert message in out
    holds(hub, vehicles_run)
    code, out, _ = client.command("push", vehicles_run, "--repo-id", "me/cars", "--license", "apache-2.0")
    assert code == 0
    assert len(hub.repos["models/me/cars"].commits) == 3


LOAD = """
import sys
import timm, torch
from safetensors.torch import load_file
case = load_file(sys.argv[1])
model = timm.create_model("hf-hub:me/cars", pretrained=True).eval()
with torch.inference_mode():
    assert torch.equal(model(case["images"]), case["logits"])
assert "resnext_hub" not in sys.modules
"""

FROM_HUB = """
import resnext_hub, torch
try:
    loaded = resnext_hub.from_hub("me/cars")
    with torch.inference_mode():
        logits = loaded.model(torch.ones(1, *loaded.model.pretrained_cfg["input_size"]))
    result = [loaded.revision, logits.tolist()]
except resnext_hub.errors.RunError as error:
    result = str(error)
"""


def test_a_model_downloaded_over_xet_has_the_same_logits_in_timm_and_here(
    hub: LoopbackHub, client: Client, vehicles_run: Path, tmp_path: Path
) -> None:
    assert client.command("push", vehicles_run, *PUSH)[0] == 0
    hub.requests.clear()
    model = timm.create_model(f"local-dir:{vehicles_run / 'model'}", pretrained=True).eval()
    images = torch.ones(1, *model.pretrained_cfg["input_size"])
    with torch.inference_mode():
        logits = model(images)
    assert client.run(FROM_HUB)["result"] == [hub.repos["models/me/cars"].commits[-1].oid, logits.tolist()]
    over_xet(hub, "GET /cas/v2/reconstructions", "GET /xorbs/")
    hub.requests.clear()
    save_file({"images": images, "logits": logits}, tmp_path / "case.safetensors")
    loaded = warm_start.run(
        [sys.executable, "-c", LOAD, str(tmp_path / "case.safetensors")],
        env=os.environ | hub.environment(xet=True) | {"HF_HOME": str(tmp_path)}, cwd=tmp_path,
    )  # fmt: skip
    assert loaded.returncode == 0, loaded.stderr
    over_xet(hub, "GET /cas/v2/reconstructions", "GET /xorbs/")


@mark.parametrize(
    ("position", "message"),
    [
        (-1000, "does not match its hash on the Hub; it was removed from the cache"),
        # the length of a chunk, which the client itself verifies
        (6, "me/cars: model.safetensors of me/cars could not be downloaded from the Hub: "),
    ],
)
def test_from_hub_rejects_a_corrupted_file_and_downloads_it_again(
    hub: LoopbackHub, client: Client, vehicles_run: Path, position: int, message: str
) -> None:
    assert client.command("push", vehicles_run, *PUSH)[0] == 0
    ((name, right),) = hub.xet.xorbs.items()
    wrong = bytearray(right)
    wrong[position] ^= 1
    hub.xet.xorbs[name] = bytes(wrong)
    answer = client.run(FROM_HUB)
    assert answer["code"] == 0, answer["err"]
    assert answer["result"].startswith("me/cars: model.safetensors of me/cars ")
    assert message in answer["result"]
    hub.xet.xorbs[name] = right
    assert client.run(FROM_HUB)["result"][0] == hub.repos["models/me/cars"].commits[-1].oid


@mark.parametrize("kind", ["503", "429", "reset", "truncated", "lost reply"])
@mark.parametrize(
    "route",
    [
        "GET .*/xet-write-token/",
        "POST /cas/v1/xorb-grants/",
        "PUT /xorb-uploads/",
        "POST /cas/v1/xorb-commits/",
        "POST /cas/v2/shards",
        "POST .*/commit/",
    ],
)
def test_a_transient_fault_leaves_one_complete_commit(
    hub: LoopbackHub, client: Client, vehicles_run: Path, route: str, kind: str
) -> None:
    hub.faults.append(Fault(route, kind, 1))
    code, out, err = client.command("push", vehicles_run, *PUSH)
    assert code == 0, err
    assert hub.faults[0].times == 0, "the fault was not triggered"
    assert "published and verified: http" in out
    holds(hub, vehicles_run)


@mark.parametrize(
    ("route", "kind"),
    [
        ("GET .*/xet-write-token/", "503"),
        ("POST /cas/v1/xorb-grants/", "401"),
        ("POST /cas/v1/xorb-grants/", "507"),
        ("(PUT /xorb-uploads|POST /cas/v1/xorbs)/", "reset"),
        ("POST /cas/v1/xorb-commits/", "503"),
        ("POST /cas/v2/shards", "lost reply"),
        ("POST /cas/v2/shards", "400"),
        ("POST .*/commit/", "reset"),
        ("POST .*/commit/", "507"),
    ],
)
def test_a_permanent_fault_is_reported_and_rerunning_succeeds_later(
    hub: LoopbackHub, client: Client, vehicles_run: Path, route: str, kind: str
) -> None:
    hub.create("models", "me/cars")
    hub.faults.append(Fault(route, kind, 1000))
    code, _, err = client.command("push", vehicles_run, *PUSH)
    assert code == 1, (err, hub.requests)
    last = err.strip().splitlines()[-1]
    assert last.startswith("error: me/cars could not be published: ")
    assert last.endswith(f"The model is kept in {vehicles_run / 'model'}; rerun the same command to publish it")
    assert "Traceback" not in err
    assert [commit.files for commit in hub.repos["models/me/cars"].commits] == [{}]
    hub.faults.clear()
    code, _, err = client.command("push", vehicles_run, *PUSH)
    assert code == 0, err
    holds(hub, vehicles_run)


@mark.parametrize("times", [1, 1000])
def test_a_commit_with_a_lost_reply_is_made_once(
    hub: LoopbackHub, client: Client, vehicles_run: Path, times: int
) -> None:
    hub.faults.append(Fault("POST .*/commit/", "lost reply", times))
    code, out, err = client.command("push", vehicles_run, *PUSH)
    assert code == 0, err
    assert "published and verified: http" in out
    holds(hub, vehicles_run)


@mark.parametrize("kind", ["lost reply", "503", "507"])
def test_a_pull_request_is_opened_once(hub: LoopbackHub, client: Client, vehicles_run: Path, kind: str) -> None:
    hub.faults.append(Fault("POST .*/commit/", kind, 1))
    words = ("push", vehicles_run, "--create-pr", *PUSH)
    assert client.command(*words)[0] == (1 if kind == "507" else 0)
    code, out, err = client.command(*words)
    assert code == 0, err
    assert "/discussions/1" in out
    repo = hub.repos["models/me/cars"]
    assert len(repo.pulls) == 1
    assert [commit.files for commit in repo.commits] == [{}]
    assert "model.safetensors" in repo.branches["refs/pr/1"][-1].files
    over_xet(hub, "POST /cas/v2/shards")


@mark.parametrize(
    ("route", "kind"),
    [("GET /cas/v2/reconstructions", "503"), ("GET /xorbs/", "reset"), ("GET /xorbs/", "truncated")],
)
def test_a_failed_download_is_reported_in_one_line(
    hub: LoopbackHub, client: Client, vehicles_run: Path, route: str, kind: str
) -> None:
    assert client.command("push", vehicles_run, *PUSH)[0] == 0
    hub.faults.append(Fault(route, kind, 1000))
    answer = client.run(FROM_HUB)
    assert answer["code"] == 0, answer["err"]
    assert answer["result"].startswith("me/cars: model.safetensors of me/cars could not be downloaded from the Hub: ")
    hub.faults[0] = Fault(route, kind, 1)
    assert client.run(FROM_HUB)["result"][0] == hub.repos["models/me/cars"].commits[-1].oid
    assert hub.faults[0].times == 0


def test_logs_contain_no_progress_bars(hub: LoopbackHub, vehicles_run: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.delenv("HF_HUB_DISABLE_PROGRESS_BARS")
    environment = hub.environment(xet=True) | {"HF_HOME": str(tmp_path)}
    done = run_process("scripts/push.py", vehicles_run, *PUSH, **environment)
    assert (done.returncode, done.stderr) == (0, "")
    holds(hub, vehicles_run)


def test_no_token_appears_at_the_highest_verbosity(hub: LoopbackHub, vehicles_run: Path, tmp_path: Path) -> None:
    hub.faults.append(Fault("POST .*/commit/", "507", 1000))
    environment = hub.environment(xet=True) | {"HF_HOME": str(tmp_path)}
    environment |= {"HF_DEBUG": "1", "HF_HUB_VERBOSITY": "debug", "RUST_LOG": "trace"}
    done = run_process("scripts/push.py", vehicles_run, *PUSH, **environment)
    assert done.returncode == 1
    over_xet(hub, "POST /cas/v2/shards")
    (log,) = (tmp_path / "xet" / "logs").iterdir()
    for token in (environment["HF_TOKEN"], XET_TOKEN):
        assert token not in done.stdout + done.stderr + log.read_text()


def test_a_failed_download_of_the_base_model_is_reported_in_one_line(
    hub: LoopbackHub, client: Client, vehicles_run: Path, tmp_path: Path
) -> None:
    assert client.command("push", vehicles_run, *PUSH)[0] == 0
    hub.faults.append(Fault("GET /cas/v2/reconstructions", "503", 1000))
    words = ("train", "--model", "hf-hub:me/cars", "--max-steps", 1, "--output-dir", tmp_path / "run")
    code, _, err = client.command(*words)
    assert code == 1, err
    assert "model.safetensors of me/cars could not be downloaded from the Hub: " in err
    assert not (tmp_path / "run").exists()


DATASET = """
from huggingface_hub import HfApi
from resnext_hub.data.sources import load_digits_table, load_from_hub
from resnext_hub.errors import RunError
HfApi().create_repo("me/digits", repo_type="dataset", exist_ok=True)
load_digits_table().to_parquet("{folder}/train.parquet")
HfApi().upload_file(
    repo_id="me/digits", repo_type="dataset", path_or_fileobj="{folder}/train.parquet", path_in_repo="train.parquet"
)
result = []
for _ in range(2):
    try:
        result.append(load_from_hub("me/digits", None, None).tables["train"].num_rows)
    except RunError as error:
        result.append(str(error))
"""


def test_a_dataset_is_downloaded_over_xet_or_the_failure_reported(
    hub: LoopbackHub, client: Client, tmp_path: Path
) -> None:
    hub.faults.append(Fault("GET /cas/v2/reconstructions", "503", 6))  # all attempts of the client
    answer = client.run(DATASET.format(folder=tmp_path))
    assert answer["code"] == 0, answer["err"]
    assert answer["result"][0].startswith("me/digits could not be loaded from the Hub: ")
    assert answer["result"][1] == 1797
    over_xet(hub, "GET /xorbs/")


PUSH_CHECKPOINT = """
from pathlib import Path
from resnext_hub.hub.checkpoints import CheckpointPusher
pusher = CheckpointPusher("me/run", True, "seed: 1")
pusher.push(Path({checkpoint!r}))
pusher.finish()
"""

FETCH_RUN = """
from resnext_hub.errors import RunError
from resnext_hub.hub.checkpoints import fetch_run, restore_run
from resnext_hub.run_folder import RunFolder
try:
    restore_run(fetch_run("hub:me/run"), RunFolder(Path({folder!r})))
    result = "restored"
except RunError as error:
    result = str(error)
"""


@mark.parametrize(
    ("route", "kind"),
    [("PUT /xorb-uploads/", "reset"), ("POST /cas/v2/shards", "400"), ("POST .*/commit/", "lost reply")],
)
def test_a_checkpoint_round_trips_over_xet_or_the_failure_is_reported(
    hub: LoopbackHub, client: Client, tmp_path: Path, route: str, kind: str
) -> None:
    checkpoint = tmp_path / "run" / "checkpoints" / "step-00000020"
    checkpoint.mkdir(parents=True)
    tensor = torch.randn(100_000, generator=torch.Generator().manual_seed(0))
    save_file({"weights": tensor}, checkpoint / "model.safetensors")
    hub.faults.append(Fault(route, kind, 1))
    pushed = client.run(PUSH_CHECKPOINT.format(checkpoint=str(checkpoint)))
    assert pushed["code"] == 0, pushed["err"]
    assert "could not be uploaded" not in pushed["err"]
    assert sum("/commit/checkpoints" in request for request in hub.requests) == 1
    over_xet(hub, "POST /cas/v2/shards")
    fetch = "from pathlib import Path\n" + FETCH_RUN.format(folder=str(tmp_path / "found"))
    hub.faults[0] = Fault("GET /xorbs/", "reset", 1000)
    assert client.run(fetch)["result"].startswith("resume_from=hub:me/run: the Hub could not be reached: ")
    hub.faults.clear()
    assert client.run(fetch)["result"] == "restored"
    found = tmp_path / "found" / "checkpoints" / "step-00000020" / "model.safetensors"
    assert found.read_bytes() == (checkpoint / "model.safetensors").read_bytes()
    over_xet(hub, "GET /xorbs/")


def test_a_corrupted_checkpoint_is_rejected_and_downloaded_again(
    hub: LoopbackHub, client: Client, tmp_path: Path
) -> None:
    checkpoint = tmp_path / "run" / "checkpoints" / "step-00000020"
    checkpoint.mkdir(parents=True)
    tensor = torch.randn(100_000, generator=torch.Generator().manual_seed(0))
    save_file({"weights": tensor}, checkpoint / "model.safetensors")
    client.run(PUSH_CHECKPOINT.format(checkpoint=str(checkpoint)))
    fetch = "from pathlib import Path\n" + FETCH_RUN.format(folder=str(tmp_path / "found"))
    hub.faults.append(Fault("GET /xorbs/", "wrong bytes", 1))
    error = client.run(fetch)["result"]
    assert error == (
        "resume_from=hub:me/run: step-00000020/model.safetensors does not match its hash on the Hub; it was removed "
        "from the cache, so rerun the same command to download it again"
    )
    assert client.run(fetch)["result"] == "restored"

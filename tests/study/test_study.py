"""A study of real runs: it resumes, grows, is dealt out and merged, and its report follows from its records."""

import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import yaml
from PIL import Image
from pytest import approx, fixture, mark, raises
from safetensors.torch import load_file
from scipy import stats
from support import warm_start
from support.client import Client
from support.loopback_hub import Fault, serve
from support.processes import ROOT
from support.records import a_record

from resnext_hub.errors import RunError
from resnext_hub.machine import cores
from resnext_hub.record import RunRecord
from resnext_hub.study.members import BaseConfig
from resnext_hub.study.plan import Study, StudyConfig, claim_folder, plan_study
from resnext_hub.study.report import write_report
from resnext_hub.study.results import collect
from resnext_hub.study.statistics import sentence

Command = Callable[..., tuple[int, str, str]]

SMALL = ("--cardinalities", "1", "4", "--depth", "11", "--width-scale", "0.25", "--image-size", "8")
SHORT = (
    "--max-steps",
    "6",
    "--batch-size",
    "16",
    "--eval-every",
    "1",
    "--log-every",
    "1",
    "--workers",
    "0",
    "--merge-groups",
    "off",
)
TINY = ("study", "cardinality", *SMALL, *SHORT, "--seeds", "2", "--warmup-epochs", "0", "--checkpoint-every", "2")


def study_process(folder: Path, *more: str) -> subprocess.Popen[str]:
    return warm_start.Popen(
        [sys.executable, "-m", "resnext_hub", *TINY, "--study-dir", str(folder), *more],
        cwd=ROOT,
        env=dict(os.environ),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def results(folder: Path) -> dict[str, object]:
    """The part of a report that does not depend on the clock or on the process that wrote it."""
    report = json.loads((folder / "report.json").read_text())
    del report["machine"]
    for member in report["members"]:
        del member["training_images_per_second"], member["inference_images_per_second"]
        for run in member["runs"]:
            del run["wall_seconds"]
    return report


@fixture(scope="module")
def alone(tmp_path_factory) -> Path:
    """A study that nothing interrupted."""
    folder = tmp_path_factory.mktemp("study") / "alone"
    process = study_process(folder)
    out, _ = process.communicate(timeout=300)
    assert process.returncode == 0, out
    return folder


def test_the_report_follows_from_the_records_of_its_runs(alone: Path) -> None:
    accuracy: dict[str, list[float]] = {}
    for name in ("1x64d", "4x25d"):
        records = [RunRecord.load(alone / "runs" / f"{name}-seed{seed}" / "record.json") for seed in range(2)]
        accuracy[name] = [
            100 * [line["eval_top1"] for line in record.history if "eval_top1" in line][-1] for record in records
        ]
    differences = [b - a for a, b in zip(*accuracy.values(), strict=True)]
    sd = max(statistics.stdev(differences), 100 / 360)
    half = stats.t.ppf(0.975, 1) * sd / 2**0.5
    report = json.loads((alone / "report.json").read_text())
    (found,) = report["comparisons"]
    assert (found["member"], found["baseline"], found["seeds"]) == ("4x25d", "1x64d", [0, 1])
    assert found["mean"] == approx(statistics.fmean(differences))
    assert (found["low"], found["high"]) == (approx(found["mean"] - half), approx(found["mean"] + half))
    page = (alone / "README.md").read_text()
    assert f"{found['mean']:+.2f} ({found['low']:+.2f} to {found['high']:+.2f}) from 1x64d" in page
    for member in report["members"]:
        assert member["accuracy_mean"] == approx(statistics.fmean(accuracy[member["name"]]))
        assert member["inference_images_per_second"] > 0
        assert member["training_images_per_second"] > 0


def test_the_page_links_files_that_exist_and_plots_are_images(alone: Path) -> None:
    page = (alone / "README.md").read_text()
    links = re.findall(r"\]\(([^)]+)\)", page)
    assert len(links) == 4 + 2
    for link in links:
        assert (alone / link).is_file()
    for plot in ("accuracy.png", "curves.png"):
        with Image.open(alone / "plots" / plot) as image:
            assert image.width > 600


def test_members_of_one_seed_start_alike_and_see_the_same_images(alone: Path) -> None:
    first, second = (RunRecord.load(alone / "runs" / f"{name}-seed0" / "record.json") for name in ("1x64d", "4x25d"))
    different = {name for name, value in first.config.items() if value != second.config[name]}
    assert different == {"model"}
    assert first.dataset.fingerprint == second.dataset.fingerprint


def test_a_study_killed_twice_ends_like_one_left_alone(alone: Path, tmp_path: Path) -> None:
    folder = tmp_path / "killed"
    for name in ("1x64d-seed0", "4x25d-seed0"):
        process = study_process(folder)
        end = time.monotonic() + 120
        while not any((folder / "runs" / name / "checkpoints").glob("step-*")):
            assert time.monotonic() < end
            assert process.poll() is None
            time.sleep(0.05)
        process.kill()
        process.communicate()
    process = study_process(folder)
    out, _ = process.communicate(timeout=300)
    assert process.returncode == 0, out
    assert results(folder) == results(alone)
    for run in (alone / "runs").glob("*-seed?"):
        ours, theirs = (
            load_file(place / "runs" / run.name / "model" / "model.safetensors") for place in (folder, alone)
        )
        assert all((ours[key] == theirs[key]).all() for key in theirs)


def test_ctrl_c_saves_the_run_and_the_study_goes_on(alone: Path, tmp_path: Path) -> None:
    folder = tmp_path / "stopped"
    process = study_process(folder)
    end = time.monotonic() + 120
    while not (folder / "runs" / "1x64d-seed0" / "metrics.jsonl").exists():
        assert time.monotonic() < end
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 130, out
    assert "0 of 4 runs are finished: rerun the same command to resume" in out
    assert not list(folder.glob("runs/*/record.json"))


def test_shards_are_merged_to_the_study_of_one_machine(alone: Path, tmp_path: Path, command: Command) -> None:
    for index in (1, 2):
        shutil.copytree(alone, tmp_path / f"part{index}", ignore=shutil.ignore_patterns("report.json", "README.md"))
        for run in sorted((tmp_path / f"part{index}" / "runs").glob("*-seed?"), key=_order)[2 - index :: 2]:
            shutil.rmtree(run)
    flags = (*TINY, "--study-dir")
    code, out, err = command(*flags, tmp_path / "part1", "--shard", "1/2")
    assert code == 0, err
    assert "2 runs are not finished" in out
    report = json.loads((tmp_path / "part1" / "report.json").read_text())
    assert report["missing"] == ["4x25d-seed0", "4x25d-seed1"]
    code, out, err = command(*flags, tmp_path / "part1", "--merge", tmp_path / "part2")
    assert code == 0, err
    assert "not finished" not in out
    assert results(tmp_path / "part1") == results(alone)


def test_runs_of_another_kind_of_study_are_taken_over_where_architecture_and_settings_agree(
    alone: Path, tmp_path: Path, command: Command
) -> None:
    words = ["study", "resnet", *TINY[5:]]  # without --cardinalities
    code, out, err = command(*words, "--study-dir", tmp_path / "resnet", "--merge", alone)
    assert code == 0, err
    assert "copied 2 finished runs" in err
    assert "2 runs are not finished" in out
    report = json.loads((tmp_path / "resnet" / "report.json").read_text())
    assert report["missing"] == ["resnext-32x5d-seed0", "resnext-32x5d-seed1"]
    grid = json.loads((alone / "report.json").read_text())["members"][0]
    assert [run["weights_sha256"] for run in report["members"][0]["runs"]] == [
        run["weights_sha256"] for run in grid["runs"]
    ]
    code, _, err = command(*words, "--study-dir", tmp_path / "other", "--merge", tmp_path)
    assert code == 2
    assert "study.yaml cannot be read" in err
    assert "choose another --merge" in err
    assert not (tmp_path / "other").exists()
    code, _, err = command(*words, "--study-dir", tmp_path / "other", "--merge", alone, "--lr", "0.01")
    assert code == 2
    assert "it differs in lr" in err


def _order(run: Path) -> tuple[str, str]:
    name, _, seed = run.name.rpartition("-seed")
    return seed, name


def test_a_study_may_grow_but_not_change(alone: Path, tmp_path: Path, command: Command) -> None:
    folder = tmp_path / "grown"
    shutil.copytree(alone, folder)
    code, _, err = command(*TINY, "--study-dir", folder, "--lr", "0.01")
    assert code == 2
    assert "--lr was 0.1 and is now 0.01" in err
    words = [*TINY, "--study-dir", folder]
    words[words.index("4")] = "2"
    words.insert(words.index("2") + 1, "4")
    code, _, err = command(*words, "--dry-run")
    assert code == 0, err


def test_a_run_that_keeps_dying_is_tried_again_and_reported(alone: Path, tmp_path: Path) -> None:
    folder = tmp_path / "dying"
    shutil.copytree(alone, folder)
    victim = folder / "runs" / "4x25d-seed1"
    shutil.rmtree(victim)
    process = study_process(folder, "--retries", "1")
    killed, end = 0, time.monotonic() + 120
    while killed < 2 and time.monotonic() < end:
        holder = (victim / ".lock").read_text().strip() if (victim / ".lock").exists() else ""
        if holder.isdecimal() and int(holder) != process.pid:
            try:
                os.kill(int(holder), signal.SIGKILL)
            except ProcessLookupError:
                continue
            killed += 1
            (victim / ".lock").unlink(missing_ok=True)
        time.sleep(0.02)
    out, _ = process.communicate(timeout=200)
    assert process.returncode == 1, out
    assert "killed by SIGKILL; trying again" in out
    assert "1 of 4 runs failed: 4x25d-seed1 (killed by SIGKILL)" in out
    report = json.loads((folder / "report.json").read_text())
    assert report["missing"] == ["4x25d-seed1"]
    assert report["failures"] == [{"run": "4x25d-seed1", "attempts": 2, "reason": "killed by SIGKILL"}]
    assert report["comparisons"][0]["seeds"] == [0]


def test_a_dry_run_shows_members_and_time_and_writes_nothing(tmp_path: Path, command: Command, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, err = command(*TINY, "--dry-run")
    assert code == 0, err
    assert re.search(r"^4x25d +4 x 6, 12, 25", out, re.MULTILINE)
    assert re.search(r"4 runs \(2 seeds\), about \d+ minutes", out)
    assert not list(tmp_path.iterdir())


@mark.parametrize(
    ("words", "message"),
    [
        (("--shard", "3/2"), "expected I/N, such as 1/2"),
        (("--cardinalities", "4"), "expected at least two different numbers of groups"),
        (("--depth", "30"), "expected 9n + 2"),
        (("--model", "resnext_g32"), "unrecognized arguments: --model"),
        (("--image-size", "2"), "--image-size 2 is smaller than the stride"),
        (("--recipe", "none"), "does not exist; available"),
    ],
)
def test_a_wrong_request_is_refused_before_anything_runs(
    words: tuple[str, ...], message: str, command: Command, tmp_path: Path
) -> None:
    code, _, err = command(*TINY, "--study-dir", tmp_path / "study", *words)
    assert code == 2
    assert message in err
    assert not list(tmp_path.glob("study/runs/*"))


def test_on_a_cpu_runs_train_in_parallel_by_default_and_share_the_cores(tmp_path: Path) -> None:
    base, folder = BaseConfig(depth=11, width_scale=0.25), tmp_path / "study"
    study = plan_study("shortcuts", base, StudyConfig(), {"image_size": 8}, study_dir=folder)
    assert (study.jobs, study.threads) == (min(4, cores()), max(1, cores() // 4))
    alone = plan_study("shortcuts", base, StudyConfig(jobs=1), {"image_size": 8}, study_dir=folder)
    assert (alone.jobs, alone.threads) == (1, cores())


SURE = ([(0, 120)], [(1, 120)], [(2, 120)])


def synthetic(tmp_path: Path, accuracy: dict[str, dict[int, int]]) -> Study:
    """A study with records that were made up: correct images of 360, by member and seed."""
    seeds = 1 + max(seed for found in accuracy.values() for seed in found)
    study = plan_study(
        "cardinality",
        BaseConfig(depth=11, width_scale=0.25),
        StudyConfig(seeds=seeds),
        {"image_size": 8},
        cardinalities=(1, 4),
        study_dir=tmp_path / "study",
    )
    claim_folder(study)
    for member in study.design.members:
        for seed, correct in accuracy[member.name].items():
            record = a_record(
                confusion=SURE, history=[{"step": 1, "epoch": 1.0, "eval_loss": 1.0, "eval_top1": correct / 360}]
            )
            content = record.__dict__ | {"config": record.config | study.train_config.to_flat() | {"seed": seed}}
            content["model"] = record.model.__class__(**record.model.__dict__ | {"parameters": member.cost.parameters})
            content["dataset"] = record.dataset.__class__(
                **record.dataset.__dict__ | {"fingerprint": study.splits.fingerprint}
            )
            folder = study.folder.run(member.slug, seed)
            folder.path.mkdir()
            RunRecord(**content).save(folder.record)
    return study


@mark.parametrize(
    ("ours", "theirs", "words"),
    [
        ({0: 340, 1: 345, 2: 342}, {0: 300, 1: 304, 2: 303}, "**4x25d is more accurate than 1x64d**"),
        ({0: 300, 1: 304, 2: 303}, {0: 340, 1: 345, 2: 342}, "**4x25d is less accurate than 1x64d**"),
        ({0: 300, 1: 344, 2: 303}, {0: 310, 1: 305, 2: 312}, "do not distinguish 4x25d from 1x64d"),
        ({0: 340, 1: 345, 2: 342, 3: 1}, {0: 300, 1: 304, 2: 303}, "over 3 paired seeds"),
    ],
    ids=["gain", "loss", "undecided", "unequal seeds"],
)
def test_the_verdict_follows_from_the_records(tmp_path: Path, ours: dict, theirs: dict, words: str) -> None:
    study = synthetic(tmp_path, {"1x64d": theirs, "4x25d": ours})
    result = collect(study)
    write_report(result)
    (difference,) = result.differences
    assert words in sentence(difference)
    assert words in (tmp_path / "study" / "README.md").read_text()
    assert result.missing == tuple(f"1x64d-seed{seed}" for seed in ours if seed not in theirs)


def test_runs_of_other_data_or_settings_are_not_compared(tmp_path: Path) -> None:
    study = synthetic(tmp_path, {"1x64d": {0: 300}, "4x25d": {0: 310}})
    path = study.folder.run(study.design.members[0].slug, 0).record
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | {"dataset": content["dataset"] | {"fingerprint": "0" * 64}}))
    with raises(RunError, match="was trained on different images from the rest of the study"):
        collect(study)
    path.write_text(json.dumps(content | {"config": content["config"] | {"seed": 5}}))
    with raises(RunError, match="does not match its folder name"):
        collect(study)


def test_a_damaged_study_file_is_refused(tmp_path: Path, command: Command) -> None:
    folder = tmp_path / "study"
    folder.mkdir()
    for content, message in (
        ("kind: [", "cannot be read"),
        (yaml.safe_dump({"format_version": 9}), "format version 9"),
    ):
        (folder / "study.yaml").write_text(content)
        code, _, err = command(*TINY, "--study-dir", folder)
        assert code == 2
        assert message in err
    (folder / "study.yaml").unlink()
    (folder / "notes.txt").write_text("mine")
    code, _, err = command(*TINY, "--study-dir", folder)
    assert code == 2
    assert "contains other files but no study" in err


def test_a_study_is_published_in_one_commit_with_the_cards_of_its_runs(alone: Path, tmp_path: Path) -> None:
    with serve() as hub:
        client = Client(hub, tmp_path / "home")
        hub.faults.append(Fault("POST .*/commit/", "lost reply", 1))
        words = ("push", alone, "--repo-id", "me/cardinality", "--license", "mit")
        code, out, err = client.command(*words)
        assert code == 0, err
        assert "published and verified: http" in out
        files = hub.repos["models/me/cardinality"].commits[-1].files
        assert len(hub.repos["models/me/cardinality"].commits) == 2
        page = files["README.md"].decode()
        assert page.startswith("---\nlicense: mit\n")
        for link in re.findall(r"\]\(([^)]+)\)", page):
            assert link in files
        assert not any(name.endswith((".safetensors", ".log", ".lock")) for name in files)
        assert str(alone) not in "".join(content.decode(errors="ignore") for content in files.values())
        code, out, err = client.command(*words)
        assert code == 0, err
        assert "already up to date" in out
        client.close()

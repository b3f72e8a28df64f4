"""Show that two commits train the same: equal weights, metrics and pixels, and that one resumes what the other began.

    python tests/compare_commits.py v0.2.0 HEAD

Each commit is checked out in a folder of its own and runs four commands: the quickstart for 40 steps; a folder of
images with mixup, RandAugment and EMA; two processes; a stream. The SHA-256 of weights, metrics and logged pixels have
to be equal. Then every run of the first commit is cut back to a checkpoint in its middle, and the second commit resumes
it: the result has to be the same again, or the refusal is printed. The merged widths that one run measures are
remembered for the others, as they would choose by their own timings otherwise.
"""

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

SMALL: tuple[str, ...] = ("--model", "resnext26_g32", "--image-size", "32", "--batch-size", "32", "--max-steps", "20")
SMALL += ("--checkpoint-every", "10")

AUGMENTED = ("--mixup", "0.2", "--auto-augment", "rand-m7-mstd0.5", "--ema", "0.99")

COMMANDS: dict[str, tuple[int, tuple[str, ...]]] = {
    "quickstart": (1, ("--max-steps", "40", "--checkpoint-every", "20")),
    "folder": (
        1,
        (*SMALL, "--recipe", "finetune", "--no-pretrained", "--dataset", "DATA/folder", *AUGMENTED),
    ),
    "two-processes": (2, SMALL),
    "stream": (1, (*SMALL, "--dataset", "DATA/parquet", "--streaming", "--shuffle-block", "200")),
}
"""Number of processes and flags by name; DATA stands for the folder of the inputs."""

CLOCK = ("images_per_second", "data_wait")
"""Fields of metrics.jsonl that two runs cannot have in common."""


def write_inputs(folder: Path) -> None:
    """Write the bundled digits as class folders of images, and as parquet files of two splits."""
    import datasets
    from sklearn.datasets import load_digits

    digits = load_digits()
    rows = []
    for index, (pixels, label) in enumerate(zip(digits.images[:600], digits.target[:600], strict=True)):
        from PIL import Image

        place = folder / "folder" / f"digit-{label}"
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray((pixels * 15.9).astype("uint8")).resize((40, 36)).save(place / f"{index:04d}.png")
        rows.append({"image": {"bytes": (place / f"{index:04d}.png").read_bytes(), "path": None}, "label": int(label)})
    names = [str(number) for number in range(10)]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=names)})
    (folder / "parquet").mkdir()
    for split, part in (("train", rows[:500]), ("test", rows[500:])):
        table = datasets.Dataset.from_list(part, features=features)
        table.to_parquet(str(folder / "parquet" / f"{split}.parquet"))


def train(checkout: Path, inputs: Path, output: Path, name: str) -> "subprocess.CompletedProcess[str]":
    """Run one of the commands with the code of a checkout."""
    processes, flags = COMMANDS[name]
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    words = [sys.executable, *(launcher if processes > 1 else []), "scripts/train.py"]
    words += [flag.replace("DATA", str(inputs)) for flag in flags]
    words += ["--output-dir", str(output), "--log-samples", "--threads", "1", "--keep-checkpoints", "9"]
    environment = os.environ | {
        "PYTHONPATH": str(checkout),
        "ACCELERATE_USE_CPU": "true",
        "OMP_NUM_THREADS": "1",
        "HF_HOME": str(inputs / "hf"),
        "HF_HUB_OFFLINE": "1",
        "RESNEXT_HUB_CACHE": str(inputs / "widths"),
    }
    return subprocess.run(words, cwd=checkout, env=environment, capture_output=True, text=True, check=False)


def digests(run: Path) -> dict[str, str]:
    """Return the SHA-256 of what a run made: weights, metrics without the clock, pixels."""
    found = {"weights": hashlib.sha256((run / "model" / "model.safetensors").read_bytes()).hexdigest()}
    for path in sorted(run.glob("*.jsonl")):
        lines = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
        kept = [{name: value for name, value in line.items() if name not in CLOCK} for line in lines]
        found[path.name] = hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()
    return found


def cut_back(run: Path, copy: Path) -> None:
    """Copy a run folder as it was at its first checkpoint but the results' own files."""
    shutil.copytree(run, copy, ignore=shutil.ignore_patterns("model", "plots", "record.json", "predictions.parquet"))
    for later in sorted((copy / "checkpoints").glob("step-*"))[1:]:
        shutil.rmtree(later)


def main() -> int:
    """Compare two commits; return 0 if they agree."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("old")
    parser.add_argument("new")
    parser.add_argument("--folder", type=Path, help="keep everything there, and use again what an earlier call made")
    options = parser.parse_args()
    folder = (options.folder or Path(tempfile.mkdtemp(prefix="compare-"))).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "inputs").is_dir():
        write_inputs(folder / "inputs")
    checkouts = {}
    for commit in (options.old, options.new):
        sha = subprocess.run(
            ["git", "rev-parse", "--short=12", commit], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout.strip()
        checkouts[commit] = folder / sha
        if not checkouts[commit].is_dir():
            subprocess.run(["git", "worktree", "prune"], cwd=ROOT, check=True)
            subprocess.run(["git", "worktree", "add", "--detach", checkouts[commit], sha], cwd=ROOT, check=True)
    agree = True
    old, new = checkouts[options.old], checkouts[options.new]
    for name in COMMANDS:
        runs = [(checkout, folder / f"{checkout.name}-{name}") for checkout in (old, new)]
        resumed = folder / f"{new.name}-resumes-{name}"
        for checkout, run in runs:
            if not (run / "record.json").is_file():
                done = train(checkout, folder / "inputs", run, name)
                if done.returncode:
                    print(f"{name}, {checkout.name}: exit code {done.returncode}\n{done.stderr[-2000:]}")
                    return 1
        cut_back(runs[0][1], resumed)
        done = train(new, folder / "inputs", resumed, name)
        reference = digests(runs[0][1])
        found = digests(runs[1][1])
        verdicts = {"trained": "equal" if found == reference else _differing(found, reference)}
        if done.returncode:
            verdicts["resumed"] = f"refused: {done.stderr.strip().splitlines()[-1]}"
        else:
            again = digests(resumed)
            verdicts["resumed"] = "equal" if again == reference else _differing(again, reference)
        agree &= all(verdict == "equal" for verdict in verdicts.values())
        print(f"{name}: weights {reference['weights'][:16]}; {verdicts}", flush=True)
    return 0 if agree else 1


def _differing(found: dict[str, str], reference: dict[str, str]) -> str:
    return "DIFFERENT: " + ", ".join(name for name in reference if found.get(name) != reference[name])


if __name__ == "__main__":
    sys.exit(main())

"""Publish a run of every variant to a loopback Hub, and load each in other environments: weights equal to the bit.

    python tests/roundtrip.py --timm PYTHON --transformers PYTHON [--xet] [NAME ...]

The first is the Python of an environment that has only timm, the second of one that has transformers beside it. With
--xet the weights go and come over Xet, else over plain LFS. The table says for each variant what loaded where. Variants
that stock timm cannot build are loaded after `import resnext_hub`, from this checkout.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from support.loopback_hub import serve

from resnext_hub.models import VARIANTS, stock_architecture

ROOT = Path(__file__).resolve().parent.parent

LOAD = """
import sys
import timm, torch
from safetensors.torch import load_file
if {plugin}:
    import resnext_hub
case = load_file({case!r})
model = timm.create_model("hf-hub:me/model", pretrained=True).eval()
with torch.inference_mode():
    # both sides copied the weights into tensors of torch's own, which are aligned alike
    assert torch.equal(model(case["images"]), case["logits"]), "timm"
if {transformers}:
    from transformers import AutoModelForImageClassification, pipeline
    wrapped = AutoModelForImageClassification.from_pretrained("me/model").eval()
    state_dict = wrapped.timm_model.state_dict()
    assert all(torch.equal(tensor, state_dict[name]) for name, tensor in model.state_dict().items()), "transformers"
    with torch.inference_mode():
        # transformers maps the file, where tensors begin at any eighth byte, and kernels may add in another order
        torch.testing.assert_close(wrapped(case["images"]).logits, case["logits"], rtol=1e-4, atol=1e-5)
    found = pipeline("image-classification", model="me/model", top_k=10)({image!r})
    assert sorted(entry["label"] for entry in found) == [str(n) for n in range(10)], found
else:
    assert "transformers" not in sys.modules
assert {plugin} or "resnext_hub" not in sys.modules
"""


def check(name: str, python: dict[str, str], scratch: Path, xet: bool) -> str:
    """Take one variant the whole way; return a row of the table."""
    variant = VARIANTS[name]
    plugin = stock_architecture(variant) is None
    run = scratch / name
    train = ["scripts/train.py", "--model", name, "--max-steps", "2", "--batch-size", "4", "--eval-fraction", "0.02"]
    train += ["--image-size", "64", "--mixed-precision", "no", "--output-dir", str(run)]
    subprocess.run([sys.executable, *train], cwd=ROOT, check=True, capture_output=True)
    if plugin:
        import resnext_hub  # noqa: F401 - registers what stock timm has not
    model = timm.create_model(f"local-dir:{run / 'model'}", pretrained=True).eval()
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        save_file({"images": images, "logits": model(images)}, scratch / "case.safetensors")
    Image.new("RGB", (40, 40), (90, 30, 200)).save(scratch / "image.png")
    cells = [name, "resnext_hub" if plugin else "stock timm"]
    with serve() as hub:
        environment = os.environ | hub.environment(xet=xet) | {"HF_HOME": str(scratch / f"home-{name}")}
        push = ["scripts/push.py", str(run), "--repo-id", "me/model", "--license", "mit"]
        done = subprocess.run([sys.executable, *push], cwd=ROOT, env=environment, capture_output=True, text=True)
        if done.returncode:
            return f"| {' | '.join([*cells, done.stderr.strip().splitlines()[-1]])} |"
        for kind, executable in python.items():
            if plugin and kind == "transformers":
                cells.append("not promised")
                continue
            code = LOAD.format(
                case=str(scratch / "case.safetensors"),
                image=str(scratch / "image.png"),
                transformers=kind == "transformers",
                plugin=plugin,
            )
            where = environment | {"HF_HOME": str(scratch / f"home-{name}-{kind}")}
            where |= {"PYTHONPATH": str(ROOT)} if plugin else {}
            done = subprocess.run([executable, "-c", code], cwd=scratch, env=where, capture_output=True, text=True)
            ways = {request.split("/")[1] for request in hub.requests if re.match(r"GET /(xorbs|cdn)/", request)}
            hub.requests.clear()
            if done.returncode:
                cells.append(done.stderr.strip().splitlines()[-1])
            else:
                cells.append("equal" if ways == {"xorbs" if xet else "cdn"} else f"came by way of {ways}")
    return f"| {' | '.join(cells)} |"


def main() -> int:
    """Print the table; return 1 if anything did not load with equal weights."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--timm", required=True, metavar="PYTHON")
    parser.add_argument("--transformers", required=True, metavar="PYTHON")
    parser.add_argument("--xet", action="store_true")
    parser.add_argument("name", nargs="*", default=list(VARIANTS))
    options = parser.parse_args()
    wrong = 0
    print("| variant | built by | timm alone | with transformers |\n|---|---|---|---|")
    python = {"timm": options.timm, "transformers": options.transformers}
    for name in options.name:
        with tempfile.TemporaryDirectory() as scratch:
            row = check(name, python, Path(scratch), options.xet)
        print(row, flush=True)
        wrong += row.count("| equal") < 2 and "not promised" not in row
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())

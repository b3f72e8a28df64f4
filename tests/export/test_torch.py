"""Programs of torch.export run with torch alone, and AOTInductor compiles them."""

import json
import re
from pathlib import Path

from pytest import fixture, mark
from support.processes import ROOT, run_process

from resnext_hub.export.runtime import export
from resnext_hub.inference.classifier import load

*_, ALONE, COMPILED = re.findall(r"```python\n(.*?)```", (ROOT / "docs/how-to/export.md").read_text(), re.DOTALL)
"""The last two snippets of docs/how-to/export.md; the second continues the first."""

WITHOUT_TIMM = """
import sys
for name in ("torchvision", "timm", "resnext_hub"):
    sys.modules[name] = None  # makes importing it fail
"""

COMPARE = """
generator = torch.Generator().manual_seed(0)
for shape in ((1, 1, 1), (1, 7, 150), (2, 200, 9), (7, 33, 64), (1, 240, 320)):
    images = torch.randint(0, 256, (*shape, 3), dtype=torch.uint8, generator=generator)
    for found, expected in zip(compiled(images), program(images), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
print(json.dumps([probabilities.sum().item(), *label.tolist()]))
"""


@fixture(scope="module")
def file(vehicles_run: Path) -> Path:
    return export(load(str(vehicles_run)), "torch").path


def test_the_file_classifies_an_image_with_torch_alone(file: Path, vehicles_run: Path) -> None:
    done = run_process("-c", WITHOUT_TIMM + _placed(ALONE, file, vehicles_run))
    assert (done.returncode, done.stdout) == (0, "bus\n"), done.stderr


@mark.slow
def test_the_file_that_aotinductor_compiles_returns_the_same_answers(file: Path, vehicles_run: Path) -> None:
    snippet = _placed(ALONE + COMPILED + COMPARE, file, vehicles_run)
    done = run_process("-c", WITHOUT_TIMM + snippet, timeout=580)
    assert done.returncode == 0, done.stderr
    first, last = done.stdout.splitlines()
    total, label = json.loads(last)
    assert (first, label) == ("bus", 0)
    assert abs(total - 1) < 1e-5


def _placed(snippet: str, file: Path, run: Path) -> str:
    image = run.parent / "vehicles" / "validation" / "bus" / "000.png"
    return snippet.replace("runs/NAME", str(file.parent)).replace("image.jpg", str(image))

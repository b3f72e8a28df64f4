"""OpenVINO as a user of a file has it."""

import functools
from typing import Any


@functools.cache
def openvino_core() -> Any:
    """Return a core that lives as long as the process: several that are destroyed crash it at the next signal."""
    import openvino

    return openvino.Core()

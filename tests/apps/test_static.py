"""`resnext-hub demo --static`: a folder whose page runs the model in the browser, and that becomes a Space."""

from collections.abc import Callable

Command = Callable[..., tuple[int, str, str]]

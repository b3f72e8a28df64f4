"""Each process needs a device of its own."""

from pytest import MonkeyPatch, mark, raises

from resnext_hub.errors import RequestError
from resnext_hub.processes.accelerator import check_devices


@mark.parametrize(("available", "devices"), [(1, "1 cuda device is"), (2, "2 cuda devices are")])
def test_processes_that_would_share_a_gpu_are_refused(monkeypatch: MonkeyPatch, available: int, devices: str) -> None:
    monkeypatch.setenv("WORLD_SIZE", "6")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    with raises(RequestError, match=f"3 processes were started .* {devices} visible; start at most {available}"):
        check_devices("cuda", available)
    check_devices("cuda", 3)
    check_devices("cpu", 0)

"""`resnext-hub demo`: try a trained model in a web page."""

import argparse
import signal
import threading
from typing import NoReturn

from resnext_hub.cli.output import write
from resnext_hub.cli.parser import add_threads, count, existing_path, new_path
from resnext_hub.errors import RequestError, StoppedRun
from resnext_hub.text import printable

HOST = "127.0.0.1"
"""Address of this machine that no other machine can connect to."""

PORT = 65_535
"""Highest port."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of the command."""
    parser.add_argument(
        "model", metavar="RUN_OR_MODEL", help="run folder, model folder, hf-hub:owner/name, or timm model name"
    )
    parser.add_argument(
        "--host",
        default=HOST,
        help=f"address to listen on; 0.0.0.0 makes the page accessible from other machines (default: {HOST})",
    )
    parser.add_argument(
        "--port", type=count(PORT), metavar="N", help="port to listen on (default: the first free port from 7860 on)"
    )
    parser.add_argument("--open", action="store_true", help="open the page in the browser")
    parser.add_argument(
        "--static",
        type=new_path,
        metavar="DIR",
        help="instead of serving the page, write it to this folder as static files for any web server; that page "
        "runs the model in the browser, from an ONNX file",
    )
    parser.add_argument(
        "--onnxruntime-web",
        type=existing_path,
        metavar="FILE",
        help="with --static: the onnxruntime-web package, as written by `npm pack` (default: npm downloads it once, "
        "and it is cached)",
    )
    add_threads(parser)


def run(options: argparse.Namespace) -> None:
    """Serve the page until a signal ends the command, or write the static one.

    Raises:
        RequestError: If flags contradict each other.
        StoppedRun: If a signal ended it.
    """
    from resnext_hub.apps.templates import title_of
    from resnext_hub.inference.classifier import load
    from resnext_hub.processes.accelerator import set_threads

    _check(options)
    classifier = load(options.model)
    set_threads(options.threads, classifier.device.type)
    title = title_of(options.model)
    if options.static is not None:
        from resnext_hub.apps.static import write_static

        size = write_static(classifier, title, options.static, options.onnxruntime_web)
        where = printable(options.static)
        write(f"page: {where}: {size / 1e6:.1f} MB; open it with python -m http.server --directory {where}\n")
        return
    from resnext_hub.apps.local import serving

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _stop)
    with serving(classifier, title, host=options.host, port=options.port, in_browser=options.open) as address:
        write(f"demo: {address} (Ctrl-C to stop)\n")
        threading.Event().wait()


def _check(options: argparse.Namespace) -> None:
    if options.static is None and options.onnxruntime_web is not None:
        raise RequestError("--onnxruntime-web needs --static DIR")
    if options.static is not None and (options.port is not None or options.open or options.host != HOST):
        raise RequestError("--static only writes a folder and cannot be combined with --host, --port or --open")


def _stop(number: int, _: object) -> NoReturn:
    raise StoppedRun("stopped", number)

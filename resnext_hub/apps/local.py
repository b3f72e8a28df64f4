"""A page on this machine, with Gradio: drop an image, and see how the model classifies it."""

import errno
import os
import socket
import tempfile
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from resnext_hub.apps.answer import answer, has_heat_maps
from resnext_hub.apps.templates import COLORS, invitation, render, text_of
from resnext_hub.data.decode import UnreadableImageError
from resnext_hub.errors import RequestError, RunError, one_line, setting
from resnext_hub.text import printable

if TYPE_CHECKING:
    from resnext_hub.inference.classifier import Classifier

UPLOAD_BYTES = 1 << 28
"""Largest file that the page takes, in bytes."""

PORTS = (7860, 7959)
"""First and last port that is tried if none is requested."""

_POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; worker-src 'self' blob:"
)
"""Content security policy: the browser refuses requests to any other server."""

_CSS = (
    ".gradio-container { width: 100% !important; max-width: 632px !important; margin: 0 auto !important; }\n"
    ".gradio-container .main { padding: 24px 16px 48px !important; }\n"
    ".html-container { padding: 0 !important; }\n"
    f".answer {{ {COLORS['light']} }}\n.dark .answer {{ {COLORS['dark']} }}\n"
)


@contextmanager
def serving(
    classifier: "Classifier", title: str, *, host: str, port: int | None, in_browser: bool = False
) -> Iterator[str]:
    """Serve the page in the background while the block runs; yield its address.

    Uploaded files are in a temporary folder, which is removed in the end. Nothing is requested from another server, by
    the page or by this process.

    Args:
        classifier: The classifier.
        title: Heading of the page.
        host: Address to listen on; others than 127.0.0.1 make the page accessible from other machines.
        port: Port to listen on; by default, the first free port from 7860 on.
        in_browser: Whether to open the page in the browser of this machine.

    Raises:
        RequestError: If the host and port cannot be listened on.
        ModuleNotFoundError: If gradio is not installed.
    """
    port = _free_port(host, port)
    with tempfile.TemporaryDirectory(prefix="resnext-hub-demo-", ignore_cleanup_errors=True) as uploads:
        os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_DISABLE_TELEMETRY": "1", "GRADIO_TEMP_DIR": uploads}
        os.environ |= dict.fromkeys(("NO_PROXY", "no_proxy"), "*")  # gradio asks its own server whether it is up
        import gradio
        from starlette.middleware import Middleware

        page = _page(classifier, title)
        page.launch(
            server_name=f"[{host}]" if ":" in host else host,  # as in an address
            server_port=port,
            share=False,
            quiet=True,
            prevent_thread_lock=True,
            inbrowser=in_browser,
            max_file_size=UPLOAD_BYTES,
            footer_links=[],
            ssr_mode=False,
            pwa=False,
            mcp_server=False,
            enable_monitoring=False,
            theme=gradio.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"]),
            css=_CSS + text_of("answer.css"),
            app_kwargs={"middleware": [Middleware(_LocalOnly)]},
        )
        try:
            yield str(page.local_url)
        finally:
            page.close(verbose=False)


def _free_port(host: str, port: int | None) -> int:
    """Return a port on which the page can be served; with an unusable address, gradio would try for minutes.

    Raises:
        RequestError: If there is none.
    """
    failure = ""
    for candidate in range(PORTS[0], PORTS[1] + 1) if port is None else (port,):
        try:
            found = socket.getaddrinfo(host, candidate, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
            family, kind, protocol, _, address = found[0]
            with socket.socket(family, kind, protocol) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind(address)
        except (OSError, UnicodeError) as error:  # UnicodeError: not a name of a host
            failure = getattr(error, "strerror", None) or one_line(error)
            if getattr(error, "errno", None) == errno.EADDRINUSE:
                continue
            break
        return candidate
    where = f"{setting('host', host)} {setting('port', f'{PORTS[0]} to {PORTS[1]}' if port is None else port)}"
    raise RequestError(f"{where}: {failure}; expected an address of this machine, and a free port")


def _page(classifier: "Classifier", title: str) -> Any:
    import gradio

    heat_map = has_heat_maps(classifier)

    def classify(path: str | None) -> tuple[str, None]:
        """Return the answer for an uploaded file, and an empty field, which takes the next one."""
        try:
            if path is None:
                return "", None
            return render("answer.html.jinja", answer=answer(classifier, path, heat_map=heat_map)), None
        except (UnreadableImageError, RunError) as error:
            return render("answer.html.jinja", reason=str(error)), None
        finally:
            if path is not None:
                os.unlink(path)

    with gradio.Blocks(title=printable(title), analytics_enabled=False) as page:
        text = invitation(classifier.label_names, classifier.is_multi_label)
        gradio.HTML(render("heading.html.jinja", title=title, invitation=text), padding=False)
        file = gradio.File(label="Image", show_label=False, file_count="single", type="filepath", height=140)
        result = gradio.HTML(padding=False)
        file.upload(classify, file, [result, file], concurrency_limit=1)
    return page


class _LocalOnly:
    """Adds the content security policy to every response."""

    def __init__(self, app: Callable[..., Awaitable[None]]) -> None:
        self._app = app

    async def __call__(self, scope: Any, receive: Any, send: Callable[[Any], Awaitable[None]]) -> None:
        """Answer a request."""

        async def with_policy(message: Any) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), (b"content-security-policy", _POLICY.encode())]
            await send(message)

        await self._app(scope, receive, with_policy)

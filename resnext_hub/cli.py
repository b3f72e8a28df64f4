"""The commands: one function called, one result printed; what goes wrong in a line. Their words stand in flags.py."""

import argparse
import contextlib
import dataclasses
import difflib
import importlib
import json
import logging
import os
import sys
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from resnext_hub.agreement import Peers, join
from resnext_hub.errors import RequestError, RunError, StoppedRun, failed_system_call, hide_tokens, one_line
from resnext_hub.machine import speaks_for_host, speaks_for_run
from resnext_hub.text import printable, python_string

if TYPE_CHECKING:
    from resnext_hub.plan import Plan
    from resnext_hub.training.config import TrainConfig

_logger = logging.getLogger(__name__)

LINE = 2000
"""Characters that an error is cut to, in the middle."""

EXTRA_OF_PACKAGE = {
    **dict.fromkeys(
        (
            "accelerate",
            "datasets",
            "jinja2",
            "matplotlib",
            "numpy",
            "PIL",
            "pyarrow",
            "simplejpeg",
            "sklearn",
            "tqdm",
            "yaml",
        ),
        "train",
    ),
    **dict.fromkeys(("onnx", "onnxruntime", "onnxscript"), "onnx"),
    **dict.fromkeys(("nncf", "openvino"), "openvino"),
}
"""What the commands import beyond the package's own dependencies, and the extra that brings it."""

OPTIONAL_PACKAGES = {"simplejpeg"}
"""Packages that a command does without, by another way."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; give its exit code: 2 for a wrong request, 1 for a failed run, above 128 for a stopped one."""
    _occupy_standard_files()
    words = list(sys.argv[1:] if arguments is None else arguments)
    speaks = speaks_for_host()  # one process of each host says what goes wrong
    _set_up_logging(speaks_for_run())
    try:
        # processes that train together fail together, down to a flag that one of them does not know
        peers = join() if words[:1] == ["train"] else Peers()
        options = peers.together(lambda: _parse(words))
        with _named_extras():
            if options.command == "train":
                _train(options, peers)
            else:
                COMMANDS[options.command](options)
    except RequestError as error:
        return _say(error, 2, speaks)
    except RunError as error:
        return _say(error, 1, speaks or not error.everywhere)
    except ImportError as error:
        return _say(f"{error.name} is installed but cannot be imported: {one_line(error)}", 1, speaks)
    except StoppedRun as stopped:
        return _say(stopped, stopped.code, speaks)
    except KeyboardInterrupt:
        return _say("stopped; the same command goes on from the last checkpoint, or else starts over", 130, speaks)
    except BrokenPipeError:  # the reader has seen enough, as head does; what is left unwritten has no place to go
        _discard_output()
        return 141
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        return _say(f"{where}{error.strerror or one_line(error)}", 1, True)
    except (MemoryError, RuntimeError) as error:
        from resnext_hub.machine import is_out_of_memory

        if not is_out_of_memory(error):
            raise
        return _say(f"out of memory ({one_line(error)[:120]}); a smaller --batch-size or image needs less", 1, True)
    return 0


def _parse(words: list[str]) -> argparse.Namespace:
    with _named_extras():
        from resnext_hub.flags import build_parser  # which needs what the extra `train` brings
    return build_parser().parse_args(words)


@contextlib.contextmanager
def _named_extras() -> Iterator[None]:
    """Name the extra that brings a package which is not installed."""
    try:
        yield
    except ModuleNotFoundError as error:
        extra = EXTRA_OF_PACKAGE.get((error.name or "").partition(".")[0])
        if extra is None:
            raise
        raise RequestError(f'{error.name} is not installed; pip install "resnext-hub[{extra}]"') from error


def _say(what: object, code: int, aloud: bool) -> int:
    if aloud:
        text = hide_tokens(printable(what))
        text = text if len(text) <= LINE else f"{text[: LINE // 2]}…{text[-LINE // 2 :]}"
        with contextlib.suppress(OSError):  # the exit code says it as well
            sys.stderr.write(f"{'' if code > 128 else 'error: '}{text}\n")
    return code


def _occupy_standard_files() -> None:
    """Connect standard files that are closed to nowhere: the next file opened would get their number, and what
    libraries print.
    """
    while (number := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(number, True)
    os.close(number)
    sys.stdout = sys.stdout or open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 - for the rest of the process
    sys.stderr = sys.stderr or open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115


class _PrintableFormatter(logging.Formatter):
    """Escapes what could steer a terminal, whatever a message quotes."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the text of a record, with its own line breaks."""
        return "\n".join(map(printable, super().format(record).split("\n")))


def _set_up_logging(is_main: bool) -> None:
    handler = logging.StreamHandler()
    handler.setFormatter(_PrintableFormatter("%(message)s"))
    logger = logging.getLogger("resnext_hub")
    logger.handlers = [handler]
    logger.setLevel(logging.INFO if is_main else logging.ERROR)
    logger.propagate = False
    if not is_main:
        os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")


def _train(options: argparse.Namespace, peers: Peers) -> None:
    plan = peers.agree(lambda: _plan(options, peers), _shared_facts)
    from resnext_hub.record import RunRecord
    from resnext_hub.run import execute, publish_run

    if plan.finished:
        record = peers.from_main(lambda: RunRecord.load(plan.folder / "record.json"))
        _print(f"{plan.folder} is finished already; nothing was computed (--epochs may grow)\n")
    else:
        with _one_line_failures(plan.config), _bars_beside_logs():
            record = execute(plan, peers)
    peers.close()
    if plan.config.publish.push_to_hub and peers.is_main:
        _print(f"published and read back: {publish_run(plan, record).address}\n")
    model = plan.folder / "model"
    evaluation = record.evaluation
    _print(
        f"accuracy {evaluation.top1:.4f}: {evaluation.correct} of {evaluation.count} held-out pictures right\n"
        f"model folder: {printable(model)}\n\n"
        f"    import timm\n"
        + ("    import resnext_hub\n" if record.model.needs_plugin else "")
        + f"    model = timm.create_model({python_string(f'local-dir:{model}')}, pretrained=True).eval()\n"
        f"    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))\n"
    )


def _plan(options: argparse.Namespace, peers: Peers) -> "Plan":
    with _named_extras():
        from resnext_hub import plan as planning
        from resnext_hub.hub.checkpoints import fetch_run, fetched_settings
        from resnext_hub.training.config import flat_fields

        asked = {name: value for name, value in vars(options).items() if name in flat_fields()}
        state = fetch_run(options.resume_from) if options.resume_from else None
        fetched = None
        if state is not None and options.config is None:
            fetched = fetched_settings(planning.read_config(state), asked, options.resume_from)
        settings, recipe = planning.merge_settings(asked, options.recipe, options.config, fetched)
        with _wrong_requests():
            plan = planning.prepare(
                settings,
                asked=asked,
                recipe=recipe,
                output_dir=options.output_dir,
                resume=options.resume,
                resume_from=state,
                peers=peers,
            )
        _require_packages("train")
        return plan


def _shared_facts(plan: "Plan") -> dict[str, object]:
    from resnext_hub.plan import shared_facts

    return shared_facts(plan)


def _info(options: argparse.Namespace) -> None:
    from resnext_hub.models.complexity import complexity_of, info_rows, preserving_width
    from resnext_hub.models.resnext import VARIANTS, Variant, variant_like

    if options.write_cards is not None:
        from resnext_hub.hub.variant_card import write_variant_cards

        try:
            written = write_variant_cards(options.write_cards)
        except OSError as error:
            where, reason = printable(options.write_cards), error.strerror or one_line(error)
            raise RequestError(f"--write-cards {where} cannot be written: {reason}; give another folder") from error
        _print("".join(f"{path}\n" for path in written))
        return
    if (options.like is None) != (options.cardinality is None):
        raise RequestError("--like and --cardinality go together: info --like resnet50 --cardinality 16")
    if options.image_size is not None and options.image_size < 1:
        raise RequestError(f"--image-size {options.image_size}: expected a positive number of pixels")
    if options.like is None:
        for name in options.name:
            if name not in VARIANTS:
                close = difflib.get_close_matches(name, VARIANTS, n=4, cutoff=0.0)
                raise RequestError(f"{name}: there is no such variant; close: {', '.join(close)}")
        chosen = [VARIANTS[name] for name in options.name or VARIANTS]
        _print(_table(info_rows(chosen, options.image_size)))
        return
    reference = variant_like(options.like)
    if reference is None:
        raise RequestError(f"--like {options.like}: expected a variant, or a name such as resnet50")

    try:
        width = preserving_width(options.cardinality, reference, options.preserve, options.image_size)
    except ValueError as error:
        raise RequestError(str(error)) from error
    solved = Variant(
        name="solved",
        layers=reference.layers,
        cardinality=options.cardinality,
        base_width=width,
        small_stem=reference.small_stem,
    )
    *_, base = (name for name, v in VARIANTS.items() if (v.layers, v.small_stem) == (solved.layers, solved.small_stem))
    _print(_table(info_rows([reference, solved], options.image_size)))
    before, after = (complexity_of(variant, options.image_size) for variant in (reference, solved))
    _print(
        f"\nparameters {after.parameters / before.parameters - 1:+.1%}, MACs {after.macs / before.macs - 1:+.1%}, "
        f"matched by --preserve {options.preserve} (block, parameters or macs)\n"
    )
    _print(f'\ntimm.create_model("{base}", cardinality={options.cardinality}, base_width={width})\n')


def _table(rows: list[tuple[str, ...]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows)
    return "".join(f"{line}\n" for line in lines)


def _evaluate(options: argparse.Namespace) -> None:
    from resnext_hub.files import sha256_of
    from resnext_hub.models.saved import WEIGHTS
    from resnext_hub.run import evaluate_run

    evaluation, record = evaluate_run(options.run, options.threads)
    recorded = record.evaluation
    text = (
        f"{evaluation.correct} of {evaluation.count} right ({evaluation.top1:.4f}), loss {evaluation.loss:.6f}; "
        f"recorded: {recorded.correct} of {recorded.count}, loss {recorded.loss:.6f}"
    )
    classes = len(record.label_names)
    if evaluation.confusion(classes) != recorded.confusion:
        raise RunError(f"the counts differ from the record: {text}")
    if sha256_of(options.run / "model" / WEIGHTS) != record.model.weights_sha256:
        raise RunError(f"the counts are those of the record, but {WEIGHTS} is not its file: {text}")
    _print(f"{text}: the same counts in every class\n")


def _predict(options: argparse.Namespace) -> None:
    import torch

    from resnext_hub.inference.predict import Unread, find_pictures, predict
    from resnext_hub.inference.trained import load_trained
    from resnext_hub.machine import device_type, set_threads

    paths = find_pictures(options.path)
    model = load_trained(options.model)
    device = torch.device(device_type())
    set_threads(options.threads, device.type)
    unread = 0
    results = predict(
        model,
        paths,
        batch_size=options.batch_size,
        device=device,
        top=options.top,
        decoder=options.decoder,
        max_pixels=options.max_image_pixels,
    )
    for result in results:
        if isinstance(result, Unread):
            unread += 1
            _logger.warning("%s: cannot be read: %s", printable(result.path), printable(result.reason))
            if options.json:
                _print(_json_line({"path": str(result.path), "error": result.reason}))
        elif options.json:
            guesses = [dataclasses.asdict(guess) for guess in result.guesses]
            _print(_json_line({"path": str(result.path), "predictions": guesses}))
        else:
            # escaped, a tab or newline in a name cannot break the columns
            columns = (f"\t{printable(guess.label)}\t{guess.probability:.4f}" for guess in result.guesses)
            _print(f"{printable(result.path)}{''.join(columns)}\n")
    if unread == len(paths):
        raise RunError(f"none of the {unread} images could be read")
    if unread:
        _logger.warning("%d of %d images could not be read", unread, len(paths))


def _json_line(content: dict[str, Any]) -> str:
    """Return JSON in one line of printable ASCII."""
    return json.dumps(content).replace("\x7f", "\\u007f") + "\n"


def _export(options: argparse.Namespace) -> None:
    from resnext_hub.inference.export import BATCH_SIZES, MAX_DROP, TOLERANCE, export
    from resnext_hub.inference.trained import load_trained
    from resnext_hub.machine import set_threads
    from resnext_hub.models.widths import list_widths

    if not options.int8 and (options.calibration is not None or options.max_drop is not None):
        raise RequestError("--calibration and --max-drop go with --int8")
    max_drop = MAX_DROP if options.max_drop is None else options.max_drop
    if not 0 <= max_drop <= 100:
        raise RequestError(f"--max-drop {max_drop:g}: expected points of top-1, 0 to 100")
    model = load_trained(options.model)
    set_threads(options.threads, "cpu")
    int8 = None
    if options.int8:
        from resnext_hub.run import prepare_int8

        int8 = prepare_int8(model, options.calibration, max_drop)
    done = export(model, options.format, options.output, merge=options.merge_groups, int8=int8)
    merged = list_widths((layer.name, layer.width, layer.merged_width) for layer in done.layers)
    size = ", ".join(map(str, model.data_config["input_size"]))
    _print(
        f"{done.path}: {done.size / 1e6:.1f} MB, images (N, {size}) float32, normalised as its metadata say, to logits "
        f"(N, {len(model.label_names)})\n"
        + (f"channels of merged groups: {merged or 'as before'}\n" if done.layers else "")
        + f"{done.runtime} against torch{', before int8' if done.int8 else ''}, at "
        f"{', '.join(map(str, BATCH_SIZES))} pictures: greatest error {done.absolute_error:.1e} absolute, "
        f"{done.relative_error:.1e} relative (tolerated: {TOLERANCE:.0e})\n"
        + (f"int8 on the held-out pictures: {done.int8}\n" if done.int8 else "")
    )


def _benchmark(options: argparse.Namespace) -> None:
    from resnext_hub.files import write_atomic
    from resnext_hub.machine import device_type, set_threads
    from resnext_hub.settings import check_value
    from resnext_hub.training.config import fields_of

    set_threads(options.threads, device_type())
    module = importlib.import_module(f"resnext_hub.benchmark.{options.kind}")
    known = fields_of(module.Settings)
    given = {name: value for name, value in vars(options).items() if name in known}
    settings = module.Settings(**{name: check_value(name, value, known[name].type) for name, value in given.items()})
    if options.json is not None and not os.access(options.json.absolute().parent, os.W_OK | os.X_OK):
        raise RequestError(f"--json {options.json}: expected a file in a folder that is there and can be written")
    contest = module.measure(settings, options.rounds)
    _print(contest.table())
    if options.json is not None:
        try:
            write_atomic(options.json, contest.to_json())
        except OSError as error:
            raise RunError(f"{options.json} could not be written: {error.strerror or error}") from error


def _push(options: argparse.Namespace) -> None:
    from resnext_hub.hub.publish import publish
    from resnext_hub.record import RunRecord

    record = RunRecord.load(options.run / "record.json")
    done = publish(
        options.run / "model",
        record,
        options.repo_id,
        options.license,
        private=options.private,
        create_pr=options.create_pr,
        revision=options.revision,
        dry_run=options.dry_run,
        overwrite_card=options.overwrite_card,
    )
    listing = "".join(f"    {size:>12,}  {name}\n" for name, size in done.files)
    if done.address is None:
        visibility = "private " if options.private else ""
        _print(f"would go to the {visibility}repository {options.repo_id} in one commit:\n{listing}")
    elif done.changed:
        _print(f"published and read back: {done.address}\n{listing}")
    else:
        _print(f"nothing has changed there: {done.address}\n")


def _require_packages(extra: str) -> None:
    """Raise an error, before any work, if a package of an extra is not installed; some are needed at the end alone."""
    for name, brought_by in EXTRA_OF_PACKAGE.items():
        if brought_by == extra and name not in OPTIONAL_PACKAGES and find_spec(name) is None:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


@contextlib.contextmanager
def _wrong_requests() -> Iterator[None]:
    """Take what the operating system refuses before any work, such as to look up a path, for a wrong request."""
    try:
        yield
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        raise RequestError(f"{where}{error.strerror or one_line(error)}") from error


@contextlib.contextmanager
def _one_line_failures(config: "TrainConfig") -> Iterator[None]:
    """Say in a line what the operating system refused, or whom it killed."""
    from resnext_hub.data.batches import lost_reader
    from resnext_hub.machine import is_out_of_memory

    try:
        yield
    except RunError:
        raise
    except (MemoryError, OSError, RuntimeError) as error:
        if is_out_of_memory(error):
            raise RunError(f"{_memory_advice(config)} ({one_line(error)[:120]})") from error
        lost = lost_reader(error)
        if lost is not None:
            raise lost from None
        if not isinstance(error, OSError):
            raise
        raise failed_system_call(error) from error


def _memory_advice(config: "TrainConfig") -> str:
    from resnext_hub.machine import processes

    part = config.batch_size // processes()
    at_once = min(config.micro_batch_size or part, part)
    size = config.transform.image_size
    smaller = f"--micro-batch-size {at_once // 2}" if at_once >= 4 else f"an --image-size below {size}"
    return (
        f"out of memory: {at_once} images of {size} px at once (global batch {config.batch_size}, evaluation "
        f"{config.eval_batch_size}); give {smaller}, or a smaller --batch-size, and another --output-dir"
    )


@contextlib.contextmanager
def _bars_beside_logs() -> Iterator[None]:
    """Keep log lines from breaking a progress bar on a terminal."""
    from tqdm.contrib.logging import logging_redirect_tqdm

    with logging_redirect_tqdm([logging.getLogger("resnext_hub")]):
        yield


def _print(text: str) -> None:
    if not speaks_for_run():
        return
    try:
        lines = ["\t".join(map(printable, line.split("\t"))) for line in text.split("\n")]
        encoding = sys.stdout.encoding or "utf-8"  # which need not have every character of a name
        sys.stdout.write("\n".join(lines).encode(encoding, errors="backslashreplace").decode(encoding))
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        _discard_output()
        raise RunError(f"standard output cannot be written: {error.strerror or error}") from error


def _discard_output() -> None:
    """Let what is left unwritten go nowhere, so that ending the process does not fail over it."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


COMMANDS = {
    "info": _info,
    "evaluate": _evaluate,
    "predict": _predict,
    "export": _export,
    "benchmark": _benchmark,
    "push": _push,
}

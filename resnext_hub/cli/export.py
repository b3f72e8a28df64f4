"""`resnext-hub export`: write a trained model for another runtime."""

import argparse
from typing import Annotated, Any

from resnext_hub.cli.output import write
from resnext_hub.cli.parser import add_threads, choice_or_count, existing_path, value_of
from resnext_hub.errors import RequestError
from resnext_hub.settings import Range


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of the command."""
    from resnext_hub.training.config import WIDTHS

    parser.add_argument(
        "model", metavar="RUN_OR_MODEL", help="run folder, model folder, hf-hub:owner/name, or timm model name"
    )
    parser.add_argument(
        "--format", choices=("onnx", "openvino", "torch"), default="onnx", help="output format (default: onnx)"
    )
    parser.add_argument(
        "--output",
        type=existing_path,
        metavar="FILE",
        help="output file, or output folder with --layout. By default, this is RUN/model.onnx for a run, FOLDER.onnx "
        "next to a model folder, and NAME.onnx in the current folder for a model from the Hub or timm; the suffix is "
        ".xml for OpenVINO and .pt2 for torch, and --int8 adds -int8 to the name. With --layout, it is RUN/ovms or "
        "RUN/triton",
    )
    parser.add_argument(
        "--layout",
        choices=("ovms", "triton"),
        help="write a model repository for a server instead of a file: ovms for OpenVINO Model Server (with --format "
        "openvino), triton for NVIDIA Triton (with --format onnx)",
    )
    parser.add_argument(
        "--raw",
        action="store_true",
        help="export only the model, which maps normalized float32 images to logits; by default, the file takes RGB "
        "images of any size and returns probabilities",
    )
    parser.add_argument(
        "--merge-groups",
        type=choice_or_count(["off", "auto"], WIDTHS, "a number of channels"),
        default="off",
        metavar="off|auto|N",
        help="merge adjacent groups of grouped convolutions to a width of N channels; auto (OpenVINO only) uses "
        "the width that is fastest on this machine. The result is the same up to rounding (default: off)",
    )
    parser.add_argument(
        "--int8",
        action="store_true",
        help="compute convolutions in int8; fails if accuracy drops by more than --max-drop",
    )
    parser.add_argument(
        "--calibration",
        metavar="DATASET",
        help="with --int8: dataset for calibration, as for train --dataset (default: the dataset of the run)",
    )
    parser.add_argument(
        "--max-drop",
        type=value_of("max_drop", Annotated[float, Range(0, 100)]),
        metavar="POINTS",
        help="with --int8: maximum drop in top-1 accuracy, in percentage points, 0 to 100 (default: 0.5)",
    )
    add_threads(parser)


def run(options: argparse.Namespace) -> None:
    """Write the file, and print its size, its input and output, and the error against torch."""
    from resnext_hub.export.int8 import MAX_DROP
    from resnext_hub.export.runtime import BATCH_SIZES, PROBABILITY_TOLERANCE, TOLERANCE
    from resnext_hub.export.serving import check_layout, file_in, model_name, repository_path, write_configuration
    from resnext_hub.inference.classifier import load
    from resnext_hub.kernels.widths import list_widths
    from resnext_hub.processes.accelerator import set_threads

    if not options.int8 and (options.calibration is not None or options.max_drop is not None):
        raise RequestError("--calibration and --max-drop need --int8")
    if options.int8 and options.format == "torch":
        raise RequestError("--int8 needs --format onnx or --format openvino")
    if options.layout is not None:
        check_layout(options.layout, options.format, raw=options.raw)
    max_drop = MAX_DROP if options.max_drop is None else options.max_drop
    classifier = load(options.model)
    set_threads(options.threads, "cpu")
    int8 = None
    if options.int8:
        from resnext_hub.runs.calibration import prepare_int8

        int8 = prepare_int8(classifier, options.calibration, max_drop)
    merge: Any = "measure" if options.merge_groups == "auto" else options.merge_groups
    path, name = options.output, ""
    if options.layout is not None:
        repository, name = options.output or repository_path(classifier, options.layout), model_name(classifier)
        path = file_in(repository, options.layout, name)
    done = classifier.export(options.format, path, merge=merge, int8=int8, raw=options.raw)
    merged = list_widths((layer.name, layer.width, layer.merged_width) for layer in done.layers)
    if options.raw:
        size = ", ".join(map(str, classifier.input.input_size))
        mapping = f"normalized images (N, {size}) float32 to logits (N, {len(classifier.label_names)})"
    else:
        mapping = f"RGB images (N, height, width, 3) uint8 to {', '.join(done.outputs)}"
    write(
        f"{done.path}: {done.size / 1e6:.1f} MB, {mapping}\n"
        + (f"channels of merged groups: {merged or 'unchanged'}\n" if done.layers else "")
        + f"{done.runtime} against torch{', before int8' if done.int8 else ''}, at batch sizes "
        f"{', '.join(map(str, BATCH_SIZES))}: largest error {done.absolute_error:.1e} absolute, "
        f"{done.relative_error:.1e} relative (tolerance {TOLERANCE:.0e})\n"
        + (
            ""
            if done.probability_error is None
            else f"the whole file against timm's preprocessing: largest error of a probability "
            f"{done.probability_error:.1e} (tolerance {PROBABILITY_TOLERANCE:g})\n"
        )
        + (f"int8 on held-out images: {done.int8}\n" if done.int8 else "")
    )
    if options.layout is not None:
        written = write_configuration(repository, options.layout, name, classifier, done.outputs)
        write(f"{written}: configuration of the model {name}\n")

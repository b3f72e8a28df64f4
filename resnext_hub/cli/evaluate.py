"""`resnext-hub evaluate`: re-evaluate the model of a run, and compare the result with its record."""

import argparse

from resnext_hub.cli.output import write
from resnext_hub.cli.parser import add_threads, existing_path
from resnext_hub.errors import RunError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of the command."""
    parser.add_argument("run", type=existing_path, help="run folder")
    add_threads(parser)


def run(options: argparse.Namespace) -> None:
    """Evaluate, and print the counts beside the recorded ones.

    Raises:
        RunError: If the counts or the weights differ from the record.
    """
    from resnext_hub.files import sha256_of
    from resnext_hub.models.saved import WEIGHTS
    from resnext_hub.run_folder import RunFolder
    from resnext_hub.runs.evaluate import evaluate_run, same_counts
    from resnext_hub.training.recorder import summary_of

    evaluations, record = evaluate_run(options.run, options.threads)
    texts = []
    for part, evaluation in evaluations.items():
        recorded = record.test if part == "test" else record.evaluation
        assert recorded is not None
        text = (
            f"{'test ' if part == 'test' else ''}{summary_of(evaluation)}, loss "
            f"{evaluation.loss:.6f}; recorded: {recorded.correct}/{recorded.count}, loss {recorded.loss:.6f}"
        )
        if not same_counts(evaluation, recorded):
            raise RunError(f"the counts differ from the record: {text}")
        texts.append(text)
    if sha256_of(RunFolder(options.run).model / WEIGHTS) != record.model.weights_sha256:
        raise RunError(f"the counts match the record, but the SHA-256 of {WEIGHTS} does not: {texts[-1]}")
    write("".join(f"{text}: the counts of every class match\n" for text in texts))

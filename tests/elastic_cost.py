"""Measure what virtual processes cost: steps with and without --elastic on the same images, in turn.

    python tests/elastic_cost.py
    torchrun --nproc_per_node 2 tests/elastic_cost.py --threads 1

The model and its batch are those of quickstart, unless flags say otherwise. Prints a row: processes, threads of each
(without --elastic, and of each virtual process), median images per second without and with it, and the median ratio of
the times of a step and the one before it.
"""

import argparse
import contextlib
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import distributed

from resnext_hub.processes.accelerator import set_threads
from resnext_hub.processes.peers import Peers, join
from resnext_hub.runs.job import build_initial_model, start_accelerator
from resnext_hub.runs.request import merge_settings, prepare
from resnext_hub.training.feed import StepInputs, training_batches
from resnext_hub.training.finetune import set_training
from resnext_hub.training.objective import build_objective
from resnext_hub.training.state import TrainingState
from resnext_hub.training.step import prepare_objective, take_step


class Steps:
    """Steps of one kind, on the first batch of the run."""

    def __init__(self, asked: dict[str, Any], folder: Path, peers: Peers) -> None:
        settings, recipe = merge_settings(asked)
        self.plan = prepare(settings, asked=asked, recipe=recipe, output_dir=folder)
        self.accelerator = start_accelerator(self.plan)
        model = build_initial_model(self.plan, peers)
        self.state = TrainingState(self.plan, model, self.accelerator, peers)
        view = self.state.build_view()
        objective = build_objective(self.plan, view, self.accelerator.device)
        self.objective = prepare_objective(objective, self.plan, self.accelerator).train()
        set_training(view)
        self.optimizer = self.accelerator.prepare(self.state.optimizer, device_placement=[False])
        batches = training_batches(self.plan, start=0, process=peers.rank, processes=peers.size, pin_memory=False)
        inputs = StepInputs(self.plan, device=self.accelerator.device, process=peers.rank)
        with contextlib.closing(batches):
            self.inputs = inputs(next(batches), 0)

    @property
    def threads(self) -> int:
        """The threads of this kind."""
        set_threads(self.plan.config.threads, "cpu")
        return torch.get_num_threads()

    def seconds(self, step: int) -> float:
        """Take a step, all processes at once; return the time until the last one is done."""
        set_threads(self.plan.config.threads, "cpu")
        begin = time.perf_counter()
        take_step(self.objective, self.optimizer, *self.inputs, step, self.plan, self.accelerator)
        if distributed.is_initialized():
            distributed.barrier()
        return time.perf_counter() - begin


def main() -> None:
    """Print the row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--elastic", type=int, default=4)
    parser.add_argument("--steps", type=int, default=20, help="of each kind")
    parser.add_argument("--threads", default="auto")
    parser.add_argument("--batch-size", type=int, default=64)
    options = parser.parse_args()
    asked = {"threads": options.threads, "batch_size": options.batch_size}
    peers = join()
    with tempfile.TemporaryDirectory() as scratch:
        kinds = [Steps(asked | more, Path(scratch) / "run", peers) for more in ({}, {"elastic": options.elastic})]
    times = [[kind.seconds(step) for kind in kinds] for step in range(options.steps + 2)][2:]
    plain, elastic = (options.batch_size / median(found) for found in zip(*times, strict=True))
    ratio = median(after / before for before, after in times)
    threads = " / ".join(str(kind.threads) for kind in kinds)
    if peers.is_main:
        print(f"| {peers.size} | {threads} | {plain:.0f} | {elastic:.0f} | {ratio:.2f} |", flush=True)
    peers.close()


if __name__ == "__main__":
    main()

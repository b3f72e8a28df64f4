"""Sums over virtual processes, to the same bits for any number of real ones.

Floating-point sums depend on the order of the additions. Here it is that of one binary tree over the virtual processes:
neighbors are added first, then the sums of neighboring pairs, and so on. A real process computes a whole subtree, and
the processes exchange the sums of their subtrees in the same pattern.
"""

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import distributed

Summands = list[torch.Tensor]
"""The tensors of a virtual process, all of one type; they are overwritten."""


def fold(parts: Iterable[Summands]) -> Summands:
    """Add lists of tensors, one after the other, in a balanced binary tree.

    Args:
        parts: The lists, a power of two of them. While n of them are added, at most log2(n) + 1 are kept.
    """
    kept: list[Summands] = []
    for number, total in enumerate(parts, 1):
        while number % 2 == 0:
            earlier = kept.pop()
            torch._foreach_add_(earlier, total)
            total, number = earlier, number // 2
        kept.append(total)
    (whole,) = kept
    return whole


class Tree:
    """The virtual processes of a run, and the part of them that this process computes.

    Args:
        size: Number of virtual processes, a power of two.
        process: Index of this process.
        processes: Number of processes; it divides `size`.
        at_once: Most virtual processes that this process computes at the same time, each in a thread.
    """

    def __init__(self, size: int, process: int = 0, processes: int = 1, at_once: int = 1) -> None:
        share = size // processes
        self.size, self.process, self.processes = size, process, processes
        self.mine = range(process * share, (process + 1) * share)
        """The virtual processes that this process computes."""
        self.threads = 1 << (min(at_once, share).bit_length() - 1)

    def sum(self, compute: Callable[[int], Summands]) -> Summands:
        """Return the sum over all virtual processes, the same in every process.

        Args:
            compute: Returns the summands of a virtual process; called once for each of this process's, in several
                threads if `at_once` is above 1.
        """
        if self.threads == 1:
            return self._exchange(fold(map(compute, self.mine)))
        length = len(self.mine) // self.threads
        subtrees = [self.mine[start : start + length] for start in range(0, len(self.mine), length)]
        # a new thread would compute with as many threads as the machine has cores
        threads = ThreadPoolExecutor(self.threads, "virtual", torch.set_num_threads, (torch.get_num_threads(),))
        with threads as pool:
            return self._exchange(fold(pool.map(lambda subtree: fold(map(compute, subtree)), subtrees)))

    def _exchange(self, total: Summands) -> Summands:
        """Add the sums of all processes: recursive halving, then doubling.

        At distance d a process and its partner each add one half of what they hold the sum of 2d processes of; in the
        end each has a part of the whole sum, and they exchange the parts in reverse order.
        """
        if self.processes == 1:
            return total
        # the padding leaves something to exchange for each of many processes, however few values there are
        values = torch.cat([*(tensor.reshape(-1) for tensor in total), total[0].new_zeros(self.processes)])
        received = torch.empty_like(values)
        mine, way = slice(0, len(values)), list[tuple[int, slice, slice]]()
        for level in range(self.processes.bit_length() - 1):
            partner = self.process ^ (1 << level)
            middle = (mine.start + mine.stop) // 2
            lower, upper = slice(mine.start, middle), slice(middle, mine.stop)
            mine, other = (lower, upper) if self.process < partner else (upper, lower)
            way.append((partner, mine, other))
            _swap(values[other], received[mine], partner)
            values[mine] += received[mine]
        for partner, mine, other in reversed(way):
            _swap(values[mine], values[other], partner)
        sizes = [tensor.numel() for tensor in total]
        for tensor, summed in zip(total, values.split([*sizes, self.processes]), strict=False):
            tensor.copy_(summed.view(tensor.shape))
        return total


def _swap(sent: torch.Tensor, received: torch.Tensor, partner: int) -> None:
    """Send a tensor to another process, and receive one from it."""
    operations: Sequence[distributed.P2POp] = [
        distributed.P2POp(distributed.isend, sent, partner),
        distributed.P2POp(distributed.irecv, received, partner),
    ]
    for work in distributed.batch_isend_irecv(list(operations)):
        work.wait()

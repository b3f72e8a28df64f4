"""Sums over virtual processes have the same bits for any number of processes."""

import os
import socket
import sys
from pathlib import Path

import torch
from pytest import fixture, mark, param
from support import warm_start
from support.processes import ROOT

from resnext_hub.processes.tree import Tree, fold

SIZE = 8

SHAPES = ((), (3,), (5, 7, 2))


def summands(index: int) -> list[torch.Tensor]:
    """Return numbers of many magnitudes, for which every order of additions has other bits."""
    generator = torch.Generator().manual_seed(index)
    return [torch.randn(shape, generator=generator) * 10.0 ** (index % 5) for shape in SHAPES]


def main() -> None:
    """Write the sum that a process gets."""
    from resnext_hub.processes.peers import join

    peers = join()
    tree = Tree(SIZE, peers.rank, peers.size, at_once=int(sys.argv[2]))
    torch.save(tree.sum(summands), Path(sys.argv[1]) / f"{peers.size}-{peers.rank}.pt")
    peers.close()


@fixture(scope="module")
def expected() -> list[torch.Tensor]:
    a, b, c, d, e, f, g, h = (summands(index) for index in range(SIZE))
    return [
        ((a[i] + b[i]) + (c[i] + d[i])) + ((e[i] + f[i]) + (g[i] + h[i])) for i in range(len(SHAPES))
    ]  # fmt: skip


def equal(some: list[torch.Tensor], others: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(some, others, strict=True))


def test_neighbors_are_added_first(expected: list[torch.Tensor]) -> None:
    assert equal(fold(summands(index) for index in range(SIZE)), expected)
    in_turn = summands(0)
    for index in range(1, SIZE):
        in_turn = [a + b for a, b in zip(in_turn, summands(index), strict=True)]
    assert not equal(in_turn, expected)


@mark.parametrize("at_once", [1, 2, 3, 8, 100])
def test_threads_do_not_change_the_sum(expected: list[torch.Tensor], at_once: int) -> None:
    assert equal(Tree(SIZE, at_once=at_once).sum(summands), expected)


@mark.parametrize(("processes", "at_once"), [(2, 1), (4, 2), param(8, 1, marks=mark.slow)])
def test_the_number_of_processes_does_not_change_the_sum(
    tmp_path: Path, expected: list[torch.Tensor], processes: int, at_once: int
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    started = []
    for rank in range(processes):
        place = {"RANK": str(rank), "WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        words = [sys.executable, __file__, str(tmp_path), str(at_once)]
        environment = os.environ | place | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}
        started.append(warm_start.Popen(words, cwd=ROOT, env=environment))
    assert [process.wait(timeout=300) for process in started] == [0] * processes
    for rank in range(processes):
        assert equal(torch.load(tmp_path / f"{processes}-{rank}.pt"), expected)


if __name__ == "__main__":
    main()

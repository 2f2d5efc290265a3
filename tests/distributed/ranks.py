"""Two processes that run the same function on gloo, and are killed together.

Starting Python, torch and a process group takes seconds, so the pair is kept between tests. After a failure
or a timeout both are killed, and the next test gets new ones: a rank that waits for a dead one is no use.
"""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import traceback
from collections.abc import Callable
from multiprocessing import connection
from typing import Any

WORLD = 2


class RankError(AssertionError):
    """A rank raised, or did not answer in time; the message has its traceback."""


class Ranks:
    """``ranks(function, *args)`` runs an importable function on every rank and returns the answers."""

    def __init__(self) -> None:
        self.processes: list[Any] = []
        self.pipes: list[connection.Connection] = []

    def __call__(self, function: Callable[..., Any], *args: Any, timeout: float = 150) -> list[Any]:
        if not self.processes:
            self._start()
        for pipe in self.pipes:
            pipe.send((function, args))
        answers: dict[int, Any] = {}
        try:
            while len(answers) < WORLD:
                # Whoever answers first: a rank that failed leaves the other waiting in a collective.
                silent = [r for r in range(WORLD) if r not in answers]
                ready = connection.wait([self.pipes[r] for r in silent], timeout)
                if not ready:
                    raise RankError(f"no answer from ranks {silent} in {timeout} s")
                rank = next(r for r in silent if self.pipes[r] in ready)
                ok, answers[rank] = self.pipes[rank].recv()
                if not ok:
                    raise RankError(f"rank {rank}:\n{answers[rank]}")
        except BaseException:
            self.stop()
            raise
        return [answers[rank] for rank in range(WORLD)]

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.folder = tempfile.TemporaryDirectory()
        for rank in range(WORLD):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_serve, args=(rank, f"file://{self.folder.name}/rendezvous", theirs)
            )
            process.daemon = True
            process.start()
            theirs.close()
            self.processes.append(process)
            self.pipes.append(ours)

    def stop(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()
        for pipe in self.pipes:
            pipe.close()
        if self.processes:
            self.folder.cleanup()
        self.processes, self.pipes = [], []


def _serve(rank: int, rendezvous: str, pipe: connection.Connection) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    import torch
    from torch import distributed

    torch.set_num_threads(1)
    distributed.init_process_group("gloo", rendezvous, rank=rank, world_size=WORLD)
    while True:
        try:
            function, args = pipe.recv()
        except EOFError:
            return
        torch._dynamo.reset()
        torch.manual_seed(0)
        try:
            pipe.send((True, function(*args)))
        except BaseException:
            pipe.send((False, traceback.format_exc()))

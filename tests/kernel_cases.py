"""What tests of generated kernels share: errors against fp64, poisoned memory, two threads at once."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence

import torch
from precision import assert_as_near, squares, wide

from sparsecc.runtime.ops.few_rows import Spec, few_rows_native, meaning

Case = tuple[torch.Tensor, list[torch.Tensor], list[torch.Tensor]]  # x, weights, operands


Run = Callable[[torch.Tensor, list[torch.Tensor], list[torch.Tensor], str], Sequence[torch.Tensor]]


def check(spec: Spec, *cases: Case, run: Run = few_rows_native) -> None:
    """Over all ``cases``, each output's root mean square error is at most 1.5 times that of its meaning.

    The kernel must be loaded.
    """
    text = spec.text()
    ours, aten = [], []
    for x, weights, operands in cases:
        got = run(x, weights, operands, text)
        plain = meaning(x, weights, operands, text)
        exact = meaning(x.double(), wide(weights), wide(operands), text)
        assert [g.shape for g in got] == [p.shape for p in plain]
        assert all(g.is_contiguous() and g.dtype is x.dtype for g in got)
        ours.append(squares(got, exact))
        aten.append(squares(plain, exact))
    assert_as_near(ours, aten, torch.finfo(cases[0][0].dtype).eps / 2)


def equal(results: Sequence[torch.Tensor], others: Sequence[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(results, others, strict=True))


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """Memory is full of NaN when a kernel gets it."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def for_threads(call: Callable[[], list[torch.Tensor]]) -> list[list[torch.Tensor]]:
    """The results of ``call`` for one, two, two again and three threads."""
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 2, 3):
            torch.set_num_threads(threads)
            results.append(call())
    finally:
        torch.set_num_threads(before)
    return results


def wrong_at_once(cases: dict[str, tuple], times: int = 50) -> list[str]:
    """The names of the cases that get other bits than alone when two threads run them at once."""
    alone = {name: few_rows_native(*case) for name, case in cases.items()}
    wrong: list[str] = []

    def work(names: list[str]) -> None:
        for name in names:
            same = [equal(few_rows_native(*cases[name]), alone[name]) for _ in range(times)]
            wrong.extend([name] * same.count(False))

    threads = [
        threading.Thread(target=work, args=(order,)) for order in (list(cases), list(cases)[::-1])
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return wrong

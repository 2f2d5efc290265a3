"""Kernels of the user, written in Triton. Without a GPU they run in Triton's interpreter, inside an operator;
a kernel called directly is a node of the graph, which must stay and keep its place among the writes.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from agreement import judge
from hard import FOLD, TO_RMS, small, x32

import sparsecc

triton = pytest.importorskip("triton", reason="the `triton` extra is not installed")
tl = pytest.importorskip("triton.language")

pytestmark = pytest.mark.slow


@triton.jit
def add_kernel(left, right, result, size, BLOCK: tl.constexpr):
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = place < size
    total = tl.load(left + place, mask=inside) + tl.load(right + place, mask=inside)
    tl.store(result + place, total, mask=inside)


def with_kernel(h: torch.Tensor) -> torch.Tensor:
    """The result buffer is read before and after the kernel writes it."""
    result = torch.ones_like(h)
    before = result + 1
    add_kernel[(triton.cdiv(h.numel(), 64),)](h.contiguous(), before, result, h.numel(), BLOCK=64)
    return result * before


def plain(h: torch.Tensor) -> torch.Tensor:
    return (h + 2) * 2


class Emulated:
    """Stands for the compiled kernel where there is no device to run it on."""

    calls = 0
    arg_names = ()  # all come by name

    def __getitem__(self, grid: Any) -> Any:
        def run(**arguments: Any) -> None:
            Emulated.calls += 1
            assert arguments["BLOCK"] == 64
            arguments["result"].copy_(arguments["left"] + arguments["right"])

        return run


@pytest.mark.filterwarnings("ignore")
def test_the_node_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    """The call survives capture, passes and PyTorch's functionalization: once a call, in its place."""
    from torch._higher_order_ops import triton_kernel_wrap
    from torch.utils import _triton

    table = type(triton_kernel_wrap.kernel_side_table)
    real = table.get_kernel

    def get_kernel(self: Any, index: int) -> Any:
        caller = sys._getframe(1).f_code.co_name
        return Emulated() if caller.endswith("_mutation_dense") else real(self, index)

    monkeypatch.setattr(_triton, "has_triton", lambda *_: True)
    monkeypatch.setattr(table, "get_kernel", get_kernel)
    model, reference = small(with_kernel).eval(), small(plain).eval()
    report = sparsecc.Report()
    options = {"report": report, "strict": True, "lower": "aot_eager"}
    fast = torch.compile(model, backend="sparsecc", options=options, fullgraph=True)
    with torch.no_grad():
        for _ in range(2):
            torch.testing.assert_close(fast(x32()), reference(x32()))
    assert Emulated.calls == 2
    assert "triton_kernel_wrapper_mutation" in report.graphs[0].opaque
    assert (report[TO_RMS].applied, report[FOLD].applied) == (2, 1)


CHILD = """
import sys, torch
sys.path.insert(0, sys.argv[1])
from conformance.test_triton import add_kernel, triton
from agreement import judge
from hard import TO_RMS, small, x32

@torch.library.custom_op("sparsecc_test::triton_add", mutates_args=())
def add(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    left, result = left.contiguous(), torch.empty(left.shape)
    size = left.numel()
    wide, left, right = left.dtype, left.float(), right.float()
    add_kernel[(triton.cdiv(size, 64),)](left, right, result, size, BLOCK=64)
    return result.to(wide)

add.register_fake(lambda left, right: torch.empty(left.shape, dtype=left.dtype))
add.register_autograd(lambda ctx, grad: (grad, grad))
judge(small(lambda h: add(h, torch.sin(h))), x32(grad=True), applied={TO_RMS: 2},
      exact=small(lambda h: h + torch.sin(h)))
print("done")
"""


def test_in_the_interpreter() -> None:
    """Values and gradients; in a process of its own, since the interpreter is chosen at import."""
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(Path(__file__).parents[1])],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip().endswith("done")


@pytest.mark.gpu
def test_on_a_gpu() -> None:
    _, report = judge(
        small(with_kernel).cuda(),
        x32().cuda(),
        applied={TO_RMS: 2, FOLD: 1},
        train=False,
        exact=small(plain).cuda(),
    )
    assert "triton_kernel_wrapper_mutation" in report.graphs[0].opaque

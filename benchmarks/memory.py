"""What a baked int8 model takes of memory, in a process that never saw the original weights.

Prediction, written before measuring: SmolLM2-135M holds 135 MB of int8 weights and scales and 113 MB of float32
embeddings, which are looked up and not multiplied. A loaded and compiled program takes 1.1 times that while it
runs, and its file for a moment beside it while it is loaded. Outcome: 1.44 times while it runs and 1.66 times
at its peak; what compiling a larger graph keeps (graphs, guards, code) is not in what a small one takes.
"""

from __future__ import annotations

import json
import pathlib
import subprocess
import sys
import tempfile
from typing import Any

import torch
from decode_quantized import names_of
from zoo import smollm2

import sparsecc
from sparsecc.recipe import Recipe

TOKENS = 64

CHILD = """
import ctypes, gc, json, sys, torch
import sparsecc.runtime.ops

def status(name):
    for line in open("/proc/self/status"):
        if line.startswith(name):
            return int(line.split()[1]) * 1024

with torch.no_grad():  # what compiling anything takes
    layers = torch.nn.Sequential(torch.nn.RMSNorm(512), torch.nn.Linear(512, 1024))
    torch.compile(layers, backend="sparsecc")(torch.randn(2, 512))
    gc.collect()
    before = status("VmRSS")
    open("/proc/self/clear_refs", "w").write("5")  # the peak counts from here
    program = torch.export.load(sys.argv[1])
    module = program.module()
    held = sum(t.nbytes for t in module.state_dict().values())
    del program
    fast = torch.compile(module, backend="sparsecc")
    ids = torch.zeros(1, int(sys.argv[2]), dtype=torch.int64)
    for _ in range(3):
        fast(ids)
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what is free goes back
    print(json.dumps({"held": held, "running": status("VmRSS") - before, "peak": status("VmHWM") - before}))
"""


class Logits(torch.nn.Module):
    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.model(input_ids=ids, use_cache=False).logits
        return logits


@torch.no_grad()
def run(limits: dict[str, float]) -> tuple[dict[str, Any], str]:
    del limits
    model = Logits(smollm2.load()).eval()
    # The tied head goes by either name: export keeps one of the two.
    sites = [f"model.{name}" for name in (*names_of(model.model), "lm_head.weight")]
    exported = torch.export.export(model, (torch.zeros(1, TOKENS, dtype=torch.int64),))
    whole = sum(p.nbytes for p in model.parameters())
    program = sparsecc.rewrite(
        exported, {"recipe": Recipe("int8", sites=dict.fromkeys(sites, "int8"))}
    )
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "model.pt2"
        torch.export.save(program, path)
        command = [sys.executable, "-c", CHILD, str(path), str(TOKENS)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    data: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    data["original"] = whole
    megabytes = {name: value / 1e6 for name, value in data.items()}
    return data, (
        f"Original weights {megabytes['original']:.0f} MB; held by the baked model {megabytes['held']:.0f} MB. "
        f"Resident memory beyond what compiling takes: {megabytes['running']:.0f} MB running "
        f"({data['running'] / data['held']:.2f}x), {megabytes['peak']:.0f} MB at its peak "
        f"({data['peak'] / data['held']:.2f}x)."
    )

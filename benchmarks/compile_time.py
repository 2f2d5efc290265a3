"""Compile time beside Inductor's, recompiles over batch sizes, and cache hits in a second process.

Prediction: capture retraces at about 0.7 ms a node, passes take a third of that: 0.7 s on a 12-layer GPT-2 of
700 nodes, 5% of Inductor's 15 s.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from typing import Any

CHILD = """
import json, sys, time, torch
from torch._dynamo.utils import counters
from transformers import GPT2Config, GPT2LMHeadModel
import sparsecc
which = sys.argv[1]
torch.manual_seed(0)
config = GPT2Config(n_layer=12, use_cache=False, vocab_size=8192)
model = GPT2LMHeadModel(config).eval()
report = sparsecc.Report()
options = {"report": report} if which == "sparsecc" else None
fast = torch.compile(model, backend=which, options=options)
with torch.no_grad():
    started = time.perf_counter()
    fast(torch.randint(0, 8192, (2 if sys.argv[2] == "once" else 1, 64)))
    first = time.perf_counter() - started
    if sys.argv[2] == "batches":
        for batch in range(2, 17):
            fast(torch.randint(0, 8192, (batch, 64)))
graphs = report.graphs
print(json.dumps({
    "first_call": first,
    "ours": sum(sum(v for k, v in g.seconds.items() if k in ("capture", "passes", "hoist")) for g in graphs),
    "inductor": sum(g.seconds.get("inductor", 0) for g in graphs),
    "nodes": sum(g.nodes for g in graphs[:1]),
    "compiles": counters["stats"]["unique_graphs"],
    "cache": {k: v for g in ("inductor", "aot_autograd") for k, v in counters[g].items() if "cache" in k},
    "rewrites": {p.name: p.applied for p in report if p.applied} if graphs else {},
}))
"""


def run(limits: dict[str, float]) -> tuple[dict[str, Any], str]:
    del limits
    data: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as cold:
        data["inductor_cold"] = _child("inductor", "once", cold)
    with tempfile.TemporaryDirectory() as cold:
        data["sparsecc_cold"] = _child("sparsecc", "once", cold)
        data["sparsecc_second_process"] = _child("sparsecc", "once", cold)
        data["batches_1_to_16"] = _child("sparsecc", "batches", cold)
        data["inductor_batches_1_to_16"] = _child("inductor", "batches", cold)
    cold_run = data["sparsecc_cold"]
    share = cold_run["ours"] / cold_run["inductor"]
    data["share_of_inductor"] = share
    rows = [
        "GPT-2, 12 layers, cold caches:",
        "",
        f"- sparsecc's own part {cold_run['ours']:.2f} s on {cold_run['nodes']} nodes, "
        f"{share:.1%} of Inductor's {cold_run['inductor']:.1f} s in the same call",
        f"- first call: Inductor {data['inductor_cold']['first_call']:.1f} s, "
        f"sparsecc {cold_run['first_call']:.1f} s, in a second process "
        f"{data['sparsecc_second_process']['first_call']:.1f} s",
        f"- cache counters of the second process: {data['sparsecc_second_process']['cache']}",
        f"- compilations for batch sizes 1..16: {data['batches_1_to_16']['compiles']} "
        f"(Inductor: {data['inductor_batches_1_to_16']['compiles']})",
    ]
    return data, "\n".join(rows)


def _child(backend: str, what: str, cache: str) -> dict[str, Any]:
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": cache}
    done = subprocess.run(
        [sys.executable, "-c", CHILD, backend, what],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise RuntimeError(done.stderr[-2000:])
    result: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return result

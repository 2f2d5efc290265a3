"""Inductor's caches stay on: hoisted weights are inputs, so a second process compiles nothing (D20)."""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys
from typing import Any

import pytest

CHILD = """
import json, sys, torch
sys.path.insert(0, sys.argv[1])
from support import PreNorm, error, ids, randomise
from torch._dynamo.utils import counters
import sparsecc
model = randomise(PreNorm(), seed=int(sys.argv[3])).eval()
report = sparsecc.Report()
options = {**json.loads(sys.argv[2]), "report": report}
with torch.no_grad():
    result = torch.compile(model, backend="sparsecc", options=options)(ids())
    difference = error(result, model(ids()))
print(json.dumps({
    "error": difference,
    "applied": sum(p.applied for p in report if p.family == "norm"),
    **{k: v for g in ("inductor", "aot_autograd") for k, v in counters[g].items() if "cache" in k},
}))
"""


def child(cache: pathlib.Path, options: dict[str, Any], seed: int = 0) -> dict[str, Any]:
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            CHILD,
            str(pathlib.Path(__file__).parent),
            json.dumps(options),
            str(seed),
        ],
        env={**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(cache)},
        capture_output=True,
        text=True,
        check=True,
    )
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    assert found["error"] < 1e-5
    return found


@pytest.mark.slow
def test_second_process_hits_and_other_options_do_not_collide(tmp_path: pathlib.Path) -> None:
    first = child(tmp_path, {})
    assert first["applied"] == 10
    assert first["fxgraph_cache_miss"] == 1
    again = child(tmp_path, {})
    assert again["autograd_cache_hit"] == 1
    assert again["fxgraph_cache_hit"] == 1
    assert "fxgraph_cache_bypass" not in again
    # Other weights: the artifact is the same, the result is theirs.
    assert child(tmp_path, {}, seed=7)["autograd_cache_hit"] == 1
    # Other passes in the same folder: another artifact, a right result (child() checks it).
    other = child(tmp_path, {"passes": ["fold-norm-affine"]})
    assert other["applied"] == 5
    assert other.get("autograd_cache_hit", 0) == 0
    assert child(tmp_path, {"preset": "none"})["applied"] == 0

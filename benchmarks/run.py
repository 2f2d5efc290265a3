"""All benchmarks: ``make bench``, or ``python benchmarks/run.py SUITE ...`` for some of them.

Results go to ``benchmarks/results/DATE-DEVICE.{json,md}`` with versions, spreads and physical limits.
"""

from __future__ import annotations

import argparse
import datetime as dt
import json
import pathlib
import platform
import sys

HERE = pathlib.Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent / "examples")]

import budget
import compile_time
import crmsnorm
import decode
import decode_quantized
import few_rows
import freshness
import gemm
import gemv
import memory
import networks
import quantization
import quantization_encoders
import relu
import sparse_ffn
import sparsity
import speed
import torch
from limits import limits

from sparsecc.inspection import versions

SUITES = {
    "speed": speed.run,
    "networks": networks.run,
    "freshness": freshness.run,
    "compile": compile_time.run,
    "crmsnorm": crmsnorm.run,
    "decode": decode.run,
    "decode_quantized": decode_quantized.run,
    "few_rows": few_rows.run,
    "gemv": gemv.run,
    "quantization": quantization.run,
    "quantization_encoders": quantization_encoders.run,
    "gemm": gemm.run,
    "memory": memory.run,
    "budget": budget.run,
    "sparsity": sparsity.run,
    "relu": relu.run,
    "sparse_ffn": sparse_ffn.run,
}


def device() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name().lower().replace(" ", "-")
    return f"{platform.machine()}-{torch.get_num_threads()}-cores"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("suites", nargs="*", choices=[*SUITES, []], default=list(SUITES))
    parser.add_argument("--output", type=pathlib.Path, default=HERE / "results")
    arguments = parser.parse_args()
    stamp = f"{dt.date.today().isoformat()}-{device()}"
    result = {
        "date": dt.date.today().isoformat(),
        "device": device(),
        "versions": versions(),
        "limits": limits(),
    }
    print(f"{stamp}: {result['versions']}, {result['limits']}")
    lines = [f"# {stamp}", "", f"Versions: {result['versions']}", f"Limits: {result['limits']}", ""]
    for name in arguments.suites or list(SUITES):
        data, table = SUITES[name](result["limits"])
        arguments.output.mkdir(parents=True, exist_ok=True)
        for file, content in data.pop("files", {}).items():
            (arguments.output / f"{stamp}-{file}").write_text(content)
        result[name] = data
        lines += [f"## {name}", "", table, ""]
        print(table, flush=True)
    suffix = (
        "" if set(arguments.suites or SUITES) == set(SUITES) else "-" + "-".join(arguments.suites)
    )
    path = arguments.output / f"{stamp}{suffix}"
    path.with_suffix(".json").write_text(json.dumps(result, indent=2) + "\n")
    path.with_suffix(".md").write_text("\n".join(lines))
    print(f"written to {path}.{{json,md}}")


if __name__ == "__main__":
    main()

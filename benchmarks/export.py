"""Exported models in the runtimes that they are for, beside their source: time of an image, nodes, seconds to export.

    python benchmarks/export.py                        # onnxruntime and OpenVINO, one thread, batches of 1 and 8
    python benchmarks/export.py --model resnet18 --threads 2

Rounds are interleaved: quote the ratios to the source. Export is timed in a process of its own for each model, without
imports, and leaves out the comparison that `augment export` makes.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import numpy as np
from measure import interleaved, machine, quartiles, ratios, write_results

MODELS = {"source": None, "AA": "aa-resnet", "AW": "aw-resnet"}
SUFFIXES = {"onnxruntime": ".onnx", "OpenVINO": ".xml"}


def write(name: str, recipe: str | None, folder: Path) -> dict:
    """Export one model to both formats; seconds by format, and nodes of the ONNX graph."""
    import onnx
    import onnxscript
    import openvino
    import timm
    import torch

    from augment_cli import convert
    from augment_cli.exporting.formats import FORMATS
    from augment_cli.exporting.inference import for_inference

    del onnxscript, openvino  # imported before the clock starts
    model = timm.create_model(name) if recipe is None else convert(name, recipe)
    size = (3, 224, 224)
    seconds = {}
    for runtime, suffix in SUFFIXES.items():
        start = time.perf_counter()
        with torch.no_grad():
            options = {"opset": 20, "precision": "fp32", "images": None}
            FORMATS[suffix].write(for_inference(model, size), torch.randn(2, *size), folder / f"model{suffix}", options)
        seconds[runtime] = round(time.perf_counter() - start, 1)
    nodes = onnx.load(folder / "model.onnx").graph.node
    loose = sum(node.op_type == "BatchNormalization" for node in nodes)
    return {"export_seconds": seconds, "nodes": len(nodes), "batch_normalizations": loose}


def sessions(folders: dict[str, Path], threads: int) -> dict[str, dict[str, Callable[[np.ndarray], object]]]:
    """A function for each runtime and model, which runs a batch."""
    import onnxruntime
    import openvino

    def by_onnxruntime(folder: Path) -> Callable[[np.ndarray], object]:
        settings = onnxruntime.SessionOptions()
        settings.intra_op_num_threads, settings.log_severity_level = threads, 3
        session = onnxruntime.InferenceSession(folder / "model.onnx", settings, providers=["CPUExecutionProvider"])
        return lambda images: session.run(None, {"images": images})

    def by_openvino(folder: Path) -> Callable[[np.ndarray], object]:
        options = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": 1}
        request = openvino.compile_model(folder / "model.xml", "CPU", options).create_infer_request()
        return lambda images: request.infer({0: images})

    makers = {"onnxruntime": by_onnxruntime, "OpenVINO": by_openvino}
    return {runtime: {name: make(folder) for name, folder in folders.items()} for runtime, make in makers.items()}


def measure(options: argparse.Namespace, root: Path) -> dict:
    written, folders = {}, {}
    for name, recipe in MODELS.items():
        folders[name] = root / name
        folders[name].mkdir()
        call = [sys.executable, __file__, "--write", options.model, recipe or "", str(folders[name])]
        written[name] = json.loads(subprocess.run(call, check=True, stdout=subprocess.PIPE).stdout)
        print(name, written[name], flush=True)
    results: dict = {"exported": written, "runs": {}}
    for runtime, functions in sessions(folders, options.threads).items():
        for batch in options.batches:
            images = np.random.default_rng(0).standard_normal((batch, 3, 224, 224)).astype(np.float32)
            calls = {name: lambda run=run, images=images: run(images) for name, run in functions.items()}
            seconds = interleaved(calls, max(5, options.rounds // batch), lambda: None)
            results["runs"][f"{runtime}, batch {batch}"] = found = {
                name: {
                    "milliseconds": quartiles([1000 * s for s in values]),
                    "against_source": ratios(values, seconds["source"]),
                    "fastest_against_source": round(min(values) / min(seconds["source"]), 3),
                }
                for name, values in seconds.items()
            }
            for name, row in found.items():
                print(runtime, batch, name, row, flush=True)
    return results


def main() -> None:
    if sys.argv[1:2] == ["--write"]:
        model, recipe, folder = sys.argv[2:]
        print(json.dumps(write(model, recipe or None, Path(folder))))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="resnet50")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--rounds", type=int, default=80, help="at batch 1; fewer for larger ones")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        results = measure(options, Path(folder))
    versions = {name: version(name) for name in ("onnx", "onnxscript", "onnxruntime", "openvino")}
    write_results(
        "export", {"machine": machine() | versions, "model": options.model, "threads": options.threads, **results}
    )


if __name__ == "__main__":
    main()

"""Everything there is to check and to measure on one NVIDIA GPU, in under ten minutes and without a network.

    make gpu                                              # or: python benchmarks/gpu.py
    python benchmarks/gpu.py --parts models --budget 300  # seconds; or --budget models=300 layers=200
    python benchmarks/gpu.py --rehearse                   # tiny shapes on the CPU, Triton's kernels in its interpreter
    python benchmarks/gpu.py --parts tune                 # launch configurations of the kernels
    python benchmarks/gpu.py --show                       # the results that are there, as Markdown

Results are in benchmarks/results/gpu-CARD.json, or in the folder of --results, and are written after each measurement.
A second call does what is left: what failed, and what there was no time for. --again measures anew. Each part is a
process of its own, and one that fails stops no other: errors are in the results and shown at the end, and make the exit
status 1.
"""

import argparse
import os
import re
import subprocess
import sys
import time
import tomllib
import traceback
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

from gpu_parts import PARTS, ROOT, SECONDS, Call
from gpu_rows import START, Rows, failure, problems
from gpu_targets import markdown, targets

sys.path.insert(1, str(ROOT))  # the package from this tree, installed or not

RESTART = 75
"""Exit status of a part that a new process is to go on with: the card takes no more calls from this one."""
GRACE = 45
"""Seconds that a measurement may run on when its part's time is over; then it is killed."""


def main() -> int:
    options = parse()
    if options.child:
        return run_child(options)
    usual = ROOT / ("out/gpu" if options.rehearse else "benchmarks/results")
    folder = options.results.resolve() if options.results else usual
    if options.show:
        print("\n".join(markdown(Rows(path)) for path in sorted(folder.glob("gpu-*.json"))), end="")
        return 0
    about = describe(options)
    path = folder / f"gpu-{slug(about['card']['name'])}.json"
    rows = Rows(path, before=None if options.rehearse else usual / path.name)
    if options.again:
        for part in options.parts:
            rows.forget(part)
    rows.content["about"] = about
    rows.write()
    began = time.monotonic()
    try:
        for part in options.parts:
            run_part(part, path, options)
    finally:
        rows = Rows(path)
        rows.content["targets"] = targets(rows)
        rows.write()
        print(markdown(rows), flush=True)
        print(f"{time.monotonic() - began:.0f} s; results are in {path}")
    return 1 if any(part in options.parts for part, *_ in rows.failures()) else 0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=[part for part in PARTS if part != "tune"])
    parser.add_argument("--device", choices=("cuda", "cpu"), help="cuda, and cpu for a rehearsal")
    parser.add_argument("--rehearse", action="store_true", help="tiny shapes, to try everything once")
    parser.add_argument("--budget", nargs="+", default=[], metavar="[PART=]SECONDS", help="for each part, or for one")
    parser.add_argument("--results", type=Path, metavar="DIR", help="where results are kept")
    parser.add_argument("--again", action="store_true", help="measure anew what there are results of")
    parser.add_argument("--one-process", action="store_true", help="all parts in this process, which ends with a crash")
    parser.add_argument("--show", action="store_true", help="show the results that are there")
    for name, kind in (("child", str), ("until", float), ("call", str), ("file", Path)):
        parser.add_argument(f"--{name}", type=kind, help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.device = options.device or ("cpu" if options.rehearse else "cuda")
    if options.device == "cpu" and not options.rehearse:
        parser.error("on a CPU there is only --rehearse")
    try:
        options.budget = budgets(options.budget)
    except ValueError:
        parser.error(f"--budget {' '.join(options.budget)}: write 120, or models=300 layers=200")
    return options


def budgets(texts: list[str]) -> dict[str, float]:
    """Seconds for each part. Texts are as `120` for all, or `models=300`.

    Raises:
        ValueError: one is neither, or names no part.
    """
    found: dict[str, float] = dict(SECONDS)
    for text in texts:
        part, _, seconds = text.rpartition("=")
        if part and part not in PARTS:
            raise ValueError(text)
        found |= dict.fromkeys([part] if part else PARTS, float(seconds))
    return found


def describe(options: argparse.Namespace) -> dict[str, Any]:
    """The card, what drives it, and the machine."""
    import torch

    if options.device == "cuda" and not torch.cuda.is_available():
        kind = f"is made for CUDA {torch.version.cuda}" if torch.version.cuda else "is made without CUDA"
        sys.exit(
            f"gpu.py: torch {torch.__version__} {kind} and finds no NVIDIA GPU that it can use; nvidia-smi says what "
            "there is. With another environment: make gpu GPU_PYTHON=/that/bin/python. Without a GPU, "
            "python benchmarks/gpu.py --rehearse tries everything on tiny shapes"
        )
    from measure import machine

    about: dict[str, Any] = {"card": card(options.device), "machine": machine(), "commit": commit()}
    if lacking := missing():
        about["missing packages"] = ", ".join(lacking)
        print(f"gpu.py: parts will fail, for this Python lacks {about['missing packages']}", file=sys.stderr)
    return about | ({"rehearsal": "figures mean nothing"} if options.rehearse else {})


def missing() -> list[str]:
    """Requirements of the package and of its tests that are not installed."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    names = [re.split(r"[^\w-]", requirement)[0] for requirement in project["dependencies"]]
    found = {distribution.metadata["Name"].lower().replace("_", "-") for distribution in distributions()}
    return [name for name in [*names, "pytest", "hypothesis"] if name not in found]


def card(device: str) -> dict[str, Any]:
    import torch

    try:
        import triton

        found = {"triton": triton.__version__}
    except ImportError:
        found = {"triton": "none"}
    if device == "cpu":
        return {"name": "rehearsal", **found}
    properties = torch.cuda.get_device_properties(0)
    return {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "multiprocessors": properties.multi_processor_count,
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").split("\n")[0],
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        **found,
    }


def commit() -> str:
    return _output("git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*")


def _output(*command: str) -> str:
    """What a program prints, or "unknown" where there is no such program."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def run_part(part: str, path: Path, options: argparse.Namespace) -> None:
    """Run a part in processes of its own, until it is done or its time is over."""
    seconds = options.budget[part]
    until, call = time.time() + seconds, str(time.time_ns())
    print(f"\n{part}: {seconds:.0f} s at most", flush=True)
    if options.one_process:
        os.environ.update(environment(options))
        options.child, options.until, options.call, options.file = part, until, call, path
        run_child(options)
        return
    command = [sys.executable, __file__, "--child", part, "--until", str(until), "--call", call, "--file", str(path)]
    command += ["--device", options.device, *(["--rehearse"] if options.rehearse else [])]
    while True:
        code = run_process(command, environment(options), until + GRACE - time.time())
        rows = Rows(path)
        if code == 0:
            return
        if code != RESTART:
            running = rows.content["running"] or [part, START]
            reason = "it was killed: its time was over" if code is None else f"the process ended with {code}"
            rows.put(*running, {"error": {"class": "Died", "message": reason}, "call": call, "commit": commit()})
            if running[1] == START:
                return
        if time.time() > until:
            return


def environment(options: argparse.Namespace) -> dict[str, str]:
    """The package from this tree and no network; for a rehearsal, no GPU and the interpreter of Triton's kernels."""
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    own = {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "HF_HUB_OFFLINE": "1", "AUGMENT_CACHE": "off"}
    return os.environ | own | ({"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""} if options.device == "cpu" else {})


def run_process(command: list[str], environment: dict[str, str], seconds: float) -> int | None:
    """The exit status; None where it was killed, with all its children, because its time was over."""
    process = subprocess.Popen(command, env=environment, cwd=ROOT, start_new_session=True)
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        return None
    finally:
        if process.poll() is None:
            os.killpg(process.pid, 9)
            process.wait()


def run_child(options: argparse.Namespace) -> int:
    """Measure one part, in this process."""
    part, rows = options.child, Rows(options.file)
    work = options.file.parent / "work" if options.rehearse else ROOT / "out" / "gpu"
    call = Call(options.device, options.rehearse, options.until, work)
    written = {"call": options.call, "commit": commit()}
    try:
        measurements = PARTS[part](call)
    except Exception as error:
        traceback.print_exc()
        rows.put(part, START, {"error": failure(error)} | written)
        return 0
    rows.plan(part, [key for key, _ in measurements])
    for key, measure in measurements:
        if rows.is_done(part, key, options.call):
            continue
        if call.left() <= 0:
            break
        rows.begin(part, key)
        try:
            row = measure()
        except Exception as error:
            traceback.print_exc()
            row = {"error": failure(error)}
        rows.put(part, key, row | written)
        print(f"{part}: {key}: {'failed' if problems(row) else 'done'}, {call.left():.0f} s left", flush=True)
        if problems(row) and not works(options.device):
            return RESTART
    return 0


def works(device: str) -> bool:
    """Whether the card still takes calls from this process: after an illegal access it takes none."""
    if device == "cpu":
        return True
    import torch

    try:
        torch.zeros(1, device=device).item()
    except RuntimeError:
        return False
    return True


if __name__ == "__main__":
    sys.exit(main())

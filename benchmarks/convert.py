"""Time of a conversion beside creating and saving the same model, in whole processes, side by side in one run.

    python benchmarks/convert.py [--rounds 5]

Rounds interleave, so that a busy machine slows both. Quote the ratios of the medians.
"""

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path

from measure import machine, quartiles, write_results

BASELINE = """
import sys, timm, torch
from safetensors.torch import save_file
model = timm.create_model("resnet50")
save_file(model.state_dict(), sys.argv[1])
"""


def run(command: list[str]) -> tuple[float, float]:
    """Wall seconds and peak resident MiB of a process."""
    start = time.perf_counter()
    null = os.open(os.devnull, os.O_WRONLY)
    pid = os.posix_spawn(
        command[0], command, os.environ, file_actions=[(os.POSIX_SPAWN_DUP2, null, fd) for fd in (1, 2)]
    )
    _, status, usage = os.wait4(pid, 0)
    os.close(null)
    if status:
        raise SystemExit(f"{' '.join(command)} ended with status {status}")
    return time.perf_counter() - start, usage.ru_maxrss / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    with tempfile.TemporaryDirectory() as folder:
        target = str(Path(folder) / "m.safetensors")
        keep = ["--recipe", "aa-resnet", "--set", "budget.params=keep"]
        commands = {
            "create and save": [sys.executable, "-c", BASELINE, target],
            "augment convert": [
                sys.executable,
                "-m",
                "augment_cli",
                "convert",
                "resnet50",
                *keep,
                "--overwrite",
                "-o",
                target,
            ],
        }
        for command in commands.values():  # files into the cache
            run(command)
        readings = {name: [] for name in commands}
        for _ in range(rounds):
            for name, command in commands.items():
                readings[name].append(run(command))
    rows = {
        name: {"seconds": quartiles([s for s, _ in values]), "peak_mib": quartiles([m for _, m in values])}
        for name, values in readings.items()
    }
    source, converted = rows.values()
    ratios = {key: round(converted[key]["median"] / source[key]["median"], 3) for key in source}
    for name, row in rows.items():
        print(f"{name:16s} {row['seconds']['median']:6.2f} s   {row['peak_mib']['median']:7.1f} MiB")
    print(f"{'ratio':16s} {ratios['seconds']:6.2f} x   {ratios['peak_mib']:7.2f} x")
    write_results("convert", {"machine": machine(), "rounds": rounds, "rows": rows, "ratios": ratios})


if __name__ == "__main__":
    main()

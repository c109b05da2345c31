"""Time to start a command, and to analyse a large model, in processor time of fresh processes.

    OMP_NUM_THREADS=1 python benchmarks/start.py [--rounds 7]

Beside them stands what the interpreter takes for nothing, and for timm alone.
"""

import argparse
import resource
import subprocess
import sys

from measure import machine, quartiles, write_results

ANALYSE = """
import time, timm
from augment_cli.analysis import source
from augment_cli.analysis.graph import analyze
start = time.process_time()
described, model = source.describe("resnet152")
analyze(model, described.input_size)
print(time.process_time() - start)
"""

COMMANDS = {
    "python": ["-c", ""],
    "augment --help": ["-m", "augment_cli", "--help"],
    "augment finetune --help": ["-m", "augment_cli", "finetune", "--help"],
    "augment convert resnet51": ["-m", "augment_cli", "convert", "resnet51"],
    "import timm": ["-c", "import timm"],
}


def spent(arguments: list[str]) -> float:
    """Processor seconds of a process, user's and system's."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, *arguments], capture_output=True, check=False)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def analysed() -> float:
    """Processor seconds of the analysis of a ResNet-152, without imports."""
    done = subprocess.run([sys.executable, "-c", ANALYSE], capture_output=True, text=True, check=True)
    return float(done.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    rounds = parser.parse_args().rounds
    readings = {name: [] for name in (*COMMANDS, "analysis of resnet152")}
    for i in range(rounds + 1):  # the first fills the cache with files
        for name in readings:
            seconds = spent(COMMANDS[name]) if name in COMMANDS else analysed()
            if i:
                readings[name].append(seconds)
    rows = {name: quartiles(values) for name, values in readings.items()}
    for name, row in rows.items():
        print(f"{name:26s} {row['median']:6.2f} s")
    write_results("start", {"machine": machine(), "rounds": rounds, "processor_seconds": rows})


if __name__ == "__main__":
    main()

"""Triton's kernels compile for GPUs, with none here, and what they take of one fits every card from the A100 on."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.layers.helpers import needs_triton

ROOT = Path(__file__).parents[3]
CUOBJDUMP = Path("backends", "nvidia", "bin", "cuobjdump")


def compiler_is_there() -> bool:
    found = importlib.util.find_spec("triton")
    return found is not None and (Path(found.origin).parent / CUOBJDUMP).exists()


pytestmark = [needs_triton, pytest.mark.skipif(not compiler_is_there(), reason="this Triton has no compiler for CUDA")]

SHARED = 99 * 1024
"""Bytes of shared memory that a block may have on the smallest GPUs: compute capability 8.6 and 8.9."""
SPILLED = 64
"""Bytes a thread may keep in local memory: a few numbers of many, mostly addresses that the loops do not use."""


def run(tmp_path: Path, *command: object) -> str:
    """What a Python process prints, for which Triton compiles."""
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path / "cache"), "TRITON_INTERPRET": "0"}
    paths = [str(ROOT), str(ROOT / "benchmarks"), os.environ.get("PYTHONPATH")]
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    words = [sys.executable, *map(str, command)]
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert not done.returncode, done.stderr
    return done.stdout


def compiled(tmp_path: Path, *options: object) -> list[dict]:
    """Rows of benchmarks/compiled_kernels.py."""
    run(tmp_path, "benchmarks/compiled_kernels.py", "--json", tmp_path / "rows.json", *options)
    found: list[dict] = json.loads((tmp_path / "rows.json").read_text())
    return found


@pytest.mark.parametrize(("precision", "archs"), [("fp32", {80}), ("bf16", {80, 90, 100})], ids=["fp32", "bf16"])
def test_kernels_compile_and_keep_their_numbers_in_registers(precision, archs, tmp_path):
    found = compiled(tmp_path, "--quick", "--precision", precision, "--arch", *archs)
    assert {row["arch"] for row in found} == archs
    assert {row["kernel"] for row in found} == {
        "attention_forward",
        "queries_backward",
        "keys_backward",
        "table_backward",
        "conv_forward",
        "maps_backward",
        "kernel_backward",
    }
    for row in found:
        assert row["shared"] <= SHARED, row
        assert row["spilled"] <= SPILLED, row


@pytest.mark.parametrize("case", ["56x56, 128 and 128", "56x56, 3, one group"])
@pytest.mark.parametrize("arch", [90])
def test_the_widest_heads_and_the_smallest_groups_compile_in_tf32(case, arch, tmp_path):
    """These take the most shared memory, and small groups are laid out otherwise than large ones."""
    found = compiled(tmp_path, "--case", case, "--precision", "tf32", "--arch", arch)
    assert {"maps_backward", "keys_backward"} & {row["kernel"] for row in found}
    assert max(row["shared"] for row in found) <= SHARED


COUNT = """
import compiled_kernels as kernels, torch
from triton.runtime.jit import JITFunction

found = set()
JITFunction._do_compile = lambda self, key, *_, **__: found.add((self.__name__, key))
for height, width in (16, 16), (20, 30), (25, 34), (32, 40), (48, 50):
    kernels.compiled(lambda: kernels.convolution(64, (height, width), 1, torch.bfloat16), 90)
    kernels.compiled(lambda: kernels.attention(height, 24, 16, 8, torch.bfloat16), 90)
for name, _ in sorted(found):
    print(name)
"""


def test_maps_of_other_sizes_need_no_other_kernels(tmp_path):
    """Of attention there is one for each shape of tiles."""
    found = run(tmp_path, "-c", COUNT).split()
    assert {name: found.count(name) for name in ("conv_forward", "maps_backward", "kernel_backward")} == {
        "conv_forward": 1,
        "maps_backward": 1,
        "kernel_backward": 1,
    }
    assert found.count("attention_forward") <= 2

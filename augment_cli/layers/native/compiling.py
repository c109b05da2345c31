"""Compile the layers' kernels; `python compiling.py FOLDER` compiles the sources in a folder.

$CXX names the compiler, and $CXXFLAGS are added to its flags. This file imports nothing of the package, because
hatch_build.py runs it before the package is installed.
"""

import hashlib
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

FLAGS = ["-std=c++17", "-O3", "-fPIC", "-shared", "-fopenmp"]
FLAGS += ["-fno-exceptions", "-fno-rtti", "-fno-math-errno", "-fvisibility=hidden"]
FOR_INSTRUCTIONS = {
    "avx512": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma"],
    "avx2": ["-mavx2", "-mfma"],
}


def library_path(folder: Path, instructions: str) -> Path:
    """Path of the library for an instruction set; its name holds a digest of the sources, so no stale one is loaded."""
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in _sources(folder))).hexdigest()
    return folder / f"kernels-{instructions.lower()}-{digest[:12]}.so"


def compile_kernels(folder: Path) -> list[Path]:
    """Compile a library for every instruction set, and delete the libraries of other sources.

    Raises:
        OSError: not Linux on x86-64, or no compiler.
        subprocess.CalledProcessError: the compiler failed; stderr holds its messages.
    """
    if sys.platform != "linux" or platform.machine() not in ("x86_64", "AMD64"):
        raise OSError("the kernels are for Linux on x86-64")
    compiler = shutil.which(os.environ.get("CXX") or "c++")
    if compiler is None:
        raise OSError("there is no C++ compiler (c++, or $CXX)")
    flags = [*FLAGS, *os.environ.get("CXXFLAGS", "").split()]
    units = [str(path) for path in _sources(folder) if path.suffix == ".cpp"]
    libraries = {library_path(folder, name): more for name, more in FOR_INSTRUCTIONS.items()}
    for library, more in libraries.items():
        if library.exists() and library.stat().st_mtime > Path(__file__).stat().st_mtime:
            continue  # the build hook runs twice: for the metadata and for the wheel
        new = library.with_suffix(".new")
        command = [compiler, *flags, *more, *units, "-o", str(new)]
        subprocess.run(command, check=True, capture_output=True, text=True)
        new.replace(library)
    for old in set(folder.glob("kernels-*.so")) - set(libraries):
        old.unlink()
    return list(libraries)


def _sources(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.suffix in (".cpp", ".h"))


if __name__ == "__main__":
    try:
        print(*compile_kernels(Path(sys.argv[1])), sep="\n")
    except subprocess.CalledProcessError as error:
        sys.exit(error.stderr)

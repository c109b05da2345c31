"""Compiles the layers' kernels while the package is built, editable installations too.

Linux on x86-64 with a C++ compiler ($CXX, or c++); anywhere else, or where compiling fails, the package is built
without them and its layers use torch's operations. AUGMENT_NATIVE=0 asks for that, AUGMENT_NATIVE=1 makes a failure an
error.
"""

import hashlib
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

from hatchling.builders.hooks.plugin.interface import BuildHookInterface
from packaging.tags import platform_tags

FLAGS = ["-std=c++17", "-O3", "-fPIC", "-shared", "-fopenmp"]
FLAGS += ["-fno-exceptions", "-fno-rtti", "-fno-math-errno", "-fvisibility=hidden"]
FOR_INSTRUCTIONS = {
    "avx512": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma"],
    "avx2": ["-mavx2", "-mfma"],
}


class NativeKernels(BuildHookInterface):
    def initialize(self, version: str, build_data: dict) -> None:
        wish = os.environ.get("AUGMENT_NATIVE", "")
        if self.target_name != "wheel" or wish == "0":
            return
        try:
            libraries = self.compiled(Path(self.root) / "augment_cli" / "layers" / "native")
        except (OSError, subprocess.CalledProcessError) as error:
            reason = getattr(error, "stderr", None) or str(error)
            if wish == "1":
                raise RuntimeError(f"the layers' kernels could not be compiled: {reason}") from error
            self.app.display_warning(
                f"built without compiled kernels, the layers will be slower on processors: {reason}"
            )
            return
        build_data["artifacts"] += [f"/{library.relative_to(self.root)}" for library in libraries]
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-{next(platform_tags())}"

    def compiled(self, folder: Path) -> list[Path]:
        if sys.platform != "linux" or platform.machine() not in ("x86_64", "AMD64"):
            raise OSError("they are for Linux on x86-64")
        compiler = shutil.which(os.environ.get("CXX") or "c++")
        if compiler is None:
            raise OSError("there is no C++ compiler (c++, or $CXX)")
        sources, digest = self.sources(folder)
        libraries = {folder / f"kernels-{name}-{digest}.so": flags for name, flags in FOR_INSTRUCTIONS.items()}
        for library, flags in libraries.items():
            if library.exists() and library.stat().st_mtime > Path(__file__).stat().st_mtime:
                continue  # the hook runs for the metadata, and again for the wheel
            new = library.with_suffix(".new")
            units = [str(path) for path in sources if path.suffix == ".cpp"]
            subprocess.run(
                [compiler, *FLAGS, *flags, *units, "-o", str(new)], check=True, capture_output=True, text=True
            )
            new.replace(library)
        for old in set(folder.glob("kernels-*.so")) - set(libraries):
            old.unlink()
        return list(libraries)

    def sources(self, folder: Path) -> tuple[list[Path], str]:
        """The sources, and the name that augment_cli.layers.native looks for."""
        sources = sorted(path for path in folder.iterdir() if path.suffix in (".cpp", ".h"))
        return sources, hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()[:12]

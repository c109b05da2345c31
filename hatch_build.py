"""Compiles the layers' kernels while the package is built, editable installations too.

Linux on x86-64 with a C++ compiler ($CXX, or c++; $CXXFLAGS are added to its flags); anywhere else, or where compiling
fails, the package is built without them and its layers use torch's operations. AUGMENT_NATIVE=0 asks for that,
AUGMENT_NATIVE=1 makes a failure an error.
"""

import os
import runpy
import subprocess
from pathlib import Path

from hatchling.builders.hooks.plugin.interface import BuildHookInterface
from packaging.tags import platform_tags


class NativeKernels(BuildHookInterface):
    def initialize(self, version: str, build_data: dict) -> None:
        wish = os.environ.get("AUGMENT_NATIVE", "")
        if self.target_name != "wheel" or wish == "0":
            return
        folder = Path(self.root) / "augment_cli" / "layers" / "native"
        try:
            libraries = runpy.run_path(str(folder / "compiling.py"))["compile_kernels"](folder)
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

"""Building the package: compile the kernels when there is a compiler, and go without them when there is none.

SFUMATO_BUILD_KERNELS=off leaves them out; =on fails where they cannot be built.
"""

from __future__ import annotations

import os
import runpy
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

VARIABLE = "SFUMATO_BUILD_KERNELS"


class KernelsHook(BuildHookInterface):
    """Puts the library beside its Python files; a wheel that has it is one for this platform."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        asked = os.environ.get(VARIABLE, "auto")
        if asked not in ("auto", "on", "off"):
            raise ValueError(f"{VARIABLE} = {asked!r}; use auto, on or off")
        script = runpy.run_path(str(Path(self.root, "src", "sfumato", "kernels", "build.py")))
        library: Path = script["LIBRARY"]
        problem = f"{VARIABLE}=off" if asked == "off" else script["build"]()
        if problem is None:
            build_data["artifacts"].append(library.relative_to(self.root).as_posix())
            build_data["pure_python"] = False
            build_data["tag"] = "py3-none-linux_x86_64"
            return
        if asked == "on":
            raise RuntimeError(f"kernels not built: {problem}")
        if version != "editable":
            library.unlink(missing_ok=True)  # an old one must not get into the wheel
        self.app.display_warning(f"kernels not built, PyTorch's are used instead: {problem}")

"""A placeholder for mmcv's compiled operations, so that mmsegmentation imports with mmcv-lite,
which has none.

``import mmseg.models`` imports all of ``mmcv.ops``, which needs ``mmcv._ext``. DeepLabV3 uses none
of it.
"""

import importlib.machinery
import importlib.util
import sys
import types
from collections.abc import Callable
from typing import Any, NoReturn

NAME = "mmcv._ext"


class Placeholder(types.ModuleType):
    def __getattr__(self, function: str) -> Callable[..., NoReturn]:
        if function.startswith("__"):  # names that Python itself looks up in a module
            raise AttributeError(f"module {NAME!r} has no attribute {function!r}")

        def missing(*args: Any, **kwargs: Any) -> NoReturn:
            raise RuntimeError(
                f"{function} is one of mmcv's compiled operations, and mmcv-lite has none of "
                "them. To use it, install full mmcv 2.1.0 in place of mmcv-lite 2.1.0; everything "
                "in this package works without it."
            )

        return missing


def install_placeholder() -> None:
    """Let ``import mmseg.models`` work without compiled operations; calling one raises
    RuntimeError.

    Does nothing if mmcv has its own ``mmcv._ext``. Call it before the first import of mmseg.
    """
    if NAME in sys.modules or importlib.util.find_spec(NAME) is not None:
        return
    placeholder = Placeholder(NAME)
    # without a spec, find_spec(NAME) raises; without a loader, mmcv's own check still says "no
    # compiled operations"
    placeholder.__spec__ = importlib.machinery.ModuleSpec(NAME, loader=None)
    sys.modules[NAME] = placeholder

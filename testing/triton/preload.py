"""What processes with Triton's interpreter need, imported once. Kernels defined in them are interpreted."""

import os
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"  # asked where a kernel is defined, Triton's own library included
import testing.triton.preload_compiler  # noqa: F401  where Triton is

# isort: split

from triton import language
from triton.runtime import interpreter


def _call(self: Any, *arguments: Any, **named: Any) -> Any:
    """Call a function of a kernel. Triton (3.9) replaces its language at every such call, a quarter of a launch's time;
    here only where the launch, or a call before, has left a builtin in place."""
    names = self.fn.__globals__
    if any(language.core.is_builtin(names[name].full) for name in ("tl", "core") if _is_language(names.get(name))):
        interpreter._patch_lang(self.fn)
    try:
        return self.rewrite()(*arguments, **named)
    except Exception as error:
        raise interpreter.InterpreterError(repr(error)) from error


def _is_language(found: object) -> bool:
    return found in (language, language.core)


interpreter.InterpretedFunction.__call__ = _call

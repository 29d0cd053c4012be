"""One kernel as Triton is to compile it, and what tells whether it would make the same of it as before."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Compilation:
    """What ``triton.compile`` takes, for one kernel."""

    source: object
    target: object
    options: dict

    def run(self):
        """triton's ``CompiledKernel``."""
        import triton

        return triton.compile(self.source, target=self.target, options=self.options)

    def digest(self, *readers) -> str:
        """Of all that figures follow from: triton's first intermediate representation (which knows nothing of names of files,
        lines and comments), all options, the versions of triton and of the assembler, and the text of what reads them.

        Args:
            readers: functions and modules that make figures of the machine code, and text that they go by.

        Returns:
            16 hexadecimal digits.
        """
        import triton
        from triton._C.libtriton import get_cache_invalidating_env_vars, ir
        from triton.compiler.compiler import make_backend

        backend = make_backend(self.target)
        options = backend.parse_options({**self.options, **self.source.parse_options()})
        context = ir.context()
        ir.load_dialects(context)
        backend.load_dialects(context)
        made = self.source.make_ir(
            self.target, options, backend.get_codegen_implementation(options), backend.get_module_map(), context
        )
        # Among the options the paths of triton's own libraries, which are those of its version.
        chosen = sorted((name, value) for name, value in vars(options).items() if name != "extern_libs")
        parts = [triton.__version__, backend.hash(), self.target, chosen, sorted(get_cache_invalidating_env_vars().items())]
        parts += [made.str_nodebug(), *(r if isinstance(r, str) else inspect.getsource(r) for r in readers)]
        return hashlib.sha256("\n".join(map(str, parts)).encode()).hexdigest()[:16]


def find_row(rows: Iterable, digest: str, **names):
    """The first of ``rows`` that has these names and was made of the source of this digest (its field ``source``), or None."""
    return next((r for r in rows if r.source == digest and all(getattr(r, k) == v for k, v in names.items())), None)

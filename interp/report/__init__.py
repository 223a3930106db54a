"""One self-contained HTML file from any set of results: `interp.report([result, figure], "report.html")`.

`write_report` does it; `Section` groups items under a heading with text and claims; `claims` keeps what a paper says
next to what we measured.
"""

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from interp.report.claims import Claim, claims_frame, read_claims, write_claims

if TYPE_CHECKING:
    from interp.report.page import Section, titled, write_report

__all__ = ["Claim", "Section", "claims_frame", "read_claims", "titled", "write_claims", "write_report"]


def __getattr__(name: str) -> Any:
    if name in ("Section", "titled", "write_report"):
        from interp.report import page  # jinja2 is loaded when a report is written

        return getattr(page, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


class _CallableModule(ModuleType):
    def __call__(self, items: Sequence[object], path: str | os.PathLike[str], **options: Any) -> Path:
        """Writes a report; see `write_report`."""
        from interp.report.page import write_report

        return write_report(items, path, **options)


# `interp.report` is this package, whatever `interp` binds to that name, because importing a submodule sets it on the
# parent. The public call is `interp.report(...)`, so the package itself has to be callable.
sys.modules[__name__].__class__ = _CallableModule

"""A local page to look at models and try them: reconstruct, edit tokens, browse the codebook, generate, watch runs.

`serve` opens it (`lexel studio`); `make_app` is the Starlette application, for tests and other servers. It needs
Lexel's extra `studio`.
"""

from lexel.studio.app import make_app
from lexel.studio.models import Library
from lexel.studio.serve import serve

__all__ = ["Library", "make_app", "serve"]

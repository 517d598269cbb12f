"""The ``curvkern`` command, also ``python -m curvkern``."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line. ``env`` comes first: it must answer where the imports of the others fail."""
    if sys.argv[1:2] == ["env"]:
        from curvkern.env import main as env

        env(sys.argv[2:])
    else:
        from curvkern.cli import main as cli

        cli()


if __name__ == "__main__":
    main()

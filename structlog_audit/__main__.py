"""The command `structlog-audit`, also without the libraries of its extra."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command, or say what it needs."""
    try:
        import click
        import rich
    except ImportError as error:
        print(f"error: the command needs the package {error.name}", file=sys.stderr)
        print("hint: pip install 'structlog-audit[cli]'", file=sys.stderr)
        judges = any(name.startswith("verify") for name in sys.argv[1:2])
        sys.exit(3 if judges else 2)  # there, 1 and 2 tell of the log
    del click, rich
    from structlog_audit.cli import run

    run()


if __name__ == "__main__":
    main()

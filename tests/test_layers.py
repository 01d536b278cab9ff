"""A module imports only from rows above its own; and nothing optional is loaded at import."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from running import run_well

import structlog_audit

ROWS = [
    "exceptions _version names values context chain merkle sinks.__init__ sinks._base "
    "sinks._durable sinks._lock",
    "entry age alarm helper disk exclusions holds note report session_tree source "
    "sinks._key sinks._exchange web._client",
    "formats anchoring archive business journal keys new_file orphans roots scan selection visible "
    "anchors facts sinks._address sinks._delivery web.__init__",
    "checkpoint proof directory evidence listing wanted workers",
    "account signed_heads",
    "judge log",
    "verify",
    "call commit cursor reader sinks.file sinks.console sinks.http sinks.combine",
    "session summary outcome follow processors operation sinks.seq spool",
    "handler logger bare_post lookup activity chart",
    "settings testing forward copies retention report_page",
    "act",
    "export survey",
    "handover keeping",
    "web._verbose",
    "web._request audited",
    "web._routes web._graphql web.django._options celery",
    "web.asgi web.wsgi web.strawberry web.ariadne web.django._logins web.django._middleware",
    "web.flask web.django.__init__ web.django.checks",
    "web.django.apps",
    "terminal",
    "cli_output",
    "doctor demo bench _pytest cli_reading",
    "cli_report verify_command cli_export cli_keeping",
    "cli",
    "__init__ __main__",
]
ROW = {module: number for number, row in enumerate(ROWS) for module in row.split()}
HOME = Path(structlog_audit.__file__).parent


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(HOME).with_suffix("").parts)


MODULES = {module_of(path): path for path in HOME.rglob("*.py")}


def imports(path: Path) -> set[str]:
    """Return the modules of the package that a module imports, anywhere in it."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        found |= {resolved(name) for name in names if name.split(".")[0] == "structlog_audit"}
    return found


def resolved(name: str) -> str:
    """Return the module that `from a.b import c` reaches: `a.b.c` or `a.b`."""
    parts = name.split(".")[1:]
    for end in range(len(parts), -1, -1):
        for module in (".".join(parts[:end]), ".".join([*parts[:end], "__init__"])):
            if module in MODULES:
                return module
    raise AssertionError(f"{name} is no module of the package")


def test_every_module_stands_in_a_row() -> None:
    """A new module is put where it belongs, and one that is gone is taken out."""
    assert set(MODULES) == set(ROW)


@pytest.mark.parametrize("module", sorted(MODULES))
def test_a_module_imports_only_from_rows_above_its_own(module: str) -> None:
    """Also within functions and for type checking."""
    below = {name for name in imports(MODULES[module]) if ROW[name] >= ROW[module]}

    assert not below


def test_importing_the_package_loads_nothing_optional() -> None:
    """No HTTP client, no retries, no command line, no web framework, no asyncio server."""
    modules = run_well("import sys, structlog_audit; print(*sys.modules)").split()

    roots = {name.split(".")[0] for name in modules}
    unwanted = {"requests", "tenacity", "click", "rich", "urllib3", "starlette", "django", "flask",
                "graphql", "strawberry", "ariadne", "pytest", "hypothesis", "cryptography",
                "multiprocessing"}  # fmt: skip
    # structlog itself loads rich where it is installed
    already = {
        n.split(".")[0] for n in run_well("import sys, structlog; print(*sys.modules)").split()
    }
    assert not (roots & unwanted) - already


def test_importing_the_package_changes_no_global_state() -> None:
    """No level name, no logger class, no signal handler, no thread."""
    script = """
        import logging, signal, threading

        def state():
            term = signal.getsignal(signal.SIGTERM)
            return logging.getLevelName(35), logging.getLoggerClass(), term, logging._handlerList[:]

        before = state()
        import structlog, structlog_audit
        assert state() == before
        assert threading.active_count() == 1
    """
    run_well(script)

"""No resolver of an audited operation runs without a Begin, and its outcome tells what became."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import graphql
import pytest
import structlog
from graphql_apps import ALL, ASYNC, Database, Service, ariadne_schema, strawberry_schema

from structlog_audit import (
    AuditConfigurationError,
    AuditHandler,
    Redact,
    audit_context,
    audit_log,
    current_operation,
    exclusions,
)
from structlog_audit.exclusions import Exclude
from structlog_audit.processors import RouteAudit
from structlog_audit.testing import FailingSink, MemorySink, capture_audit
from structlog_audit.web import _graphql
from structlog_audit.web.strawberry import AuditExtension

NOT_CARRIED_OUT = "The operation was not carried out, because it could not be recorded."


@pytest.fixture
def db(tmp_path: Path) -> Database:
    return Database(tmp_path / "effects.db")


def events(entries: list[dict[str, Any]]) -> list[tuple[str, str]]:
    return [(entry["action"], entry["event"]) for entry in entries]


@pytest.mark.parametrize("framework", ALL)
def test_a_mutation_is_on_record_before_it_runs(framework: str, db: Database) -> None:
    """Its Begin has the number that the resolver saw, and the outcome a higher one."""
    service = Service(framework, db, user=_user)
    document = "mutation Tidy($id: Int!) { deleteInvoice(id: $id) }"

    with capture_audit() as entries:
        answer = service.run(document, {"id": 7, "junk": 1}, "Tidy")

    assert answer["data"] == {"deleteInvoice": 7}
    begin, outcome = entries
    assert db.rows() == [("deleteInvoice", 7, begin["operationId"], begin["sequence"])]
    assert events(entries) == [("Tidy", "Begin"), ("Tidy", "Complete")]
    assert begin["type"] == outcome["type"] == "GraphQL"
    assert begin["userId"] == "ada"
    assert begin["data"] == {
        "operation": "mutation",
        "fields": ["deleteInvoice"],
        "variables": {"id": 7},
    }
    assert outcome["operationId"] == begin["operationId"]
    assert outcome["sequence"] > begin["sequence"]


def _user(raw: Any) -> Any:
    """Return the user, from Strawberry's execution context or Ariadne's context value."""
    return getattr(raw, "context", raw)["user"]


@pytest.mark.parametrize("framework", ALL)
def test_no_resolver_runs_when_the_begin_is_refused(framework: str, db: Database) -> None:
    """The client reads that nothing was done, and nothing of what went wrong; then all is well."""
    service = Service(framework, db)
    document = "mutation { a: deleteInvoice(id: 1) b: deleteInvoice(id: 2) }"

    with capture_audit(FailingSink(lambda number: number == 1)) as entries:
        refused = service.run(document)
        assert db.rows() == []
        assert entries == []
        service.run(document)

    assert {e["message"] for e in refused["errors"]} == {NOT_CARRIED_OUT}
    assert all(e["extensions"] == {"code": "AUDIT_UNAVAILABLE"} for e in refused["errors"])
    assert not any((refused["data"] or {}).values())
    assert "told to fail" not in str(refused)
    assert db.names() == ["deleteInvoice"] * 2
    assert events(entries) == [("deleteInvoice", "Begin"), ("deleteInvoice", "Complete")]


@pytest.mark.parametrize("framework", ALL)
def test_a_processor_that_breaks_stops_the_operation_and_shows_nothing(
    framework: str, db: Database
) -> None:
    """Whatever keeps a Begin from being recorded, its text is not for the client."""

    def broken(logger: Any, method: str, event_dict: Any) -> Any:
        raise ZeroDivisionError("a secret of the processor")

    structlog.configure(processors=[broken])

    answer = Service(framework, db).run("mutation { deleteInvoice(id: 1) }")

    assert answer["errors"][0]["message"] == NOT_CARRIED_OUT
    assert "secret" not in str(answer)
    assert db.rows() == []


@pytest.mark.parametrize("framework", ALL)
def test_a_failed_resolver_is_a_failed_operation(framework: str, db: Database) -> None:
    """The result has errors although HTTP would say 200."""
    with capture_audit() as entries:
        Service(framework, db).run('mutation { a: fail(text: "no such invoice") }')

    assert events(entries) == [("fail", "Begin"), ("fail", "Fail")]
    assert entries[1]["data"]["errors"] == [
        {"path": "a", "type": "ValueError", "message": "no such invoice"}
    ]


@pytest.mark.parametrize("framework", ASYNC)
def test_a_cancelled_mutation_is_abandoned(framework: str, db: Database) -> None:
    """The client has gone while its resolver waited."""

    async def cancelled() -> None:
        task = asyncio.create_task(Service(framework, db).arun("mutation { hang }"))
        while not db.rows():
            await asyncio.sleep(0.01)
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
        assert current_operation().receipt is None

    with capture_audit() as entries:
        asyncio.run(cancelled())

    assert events(entries) == [("hang", "Begin"), ("hang", "Abandon")]
    assert db.names() == ["hang"]


@pytest.mark.parametrize("framework", ALL)
def test_queries_are_left_out_unless_asked_for(framework: str, db: Database) -> None:
    """That they are is an exclusion to be seen, and privileged callers are not left out."""
    document = "query Look { invoices secrets }"
    with capture_audit() as entries:
        service = Service(framework, db)
        service.run(document)
        assert entries == []
        assert any("queries=True" in text for _, text in exclusions.listed())
        Service(framework, db, privileged=lambda raw: True).run(document)
        Service(framework, db, queries=True).run(document)

    assert events(entries) == [("Look", "Begin"), ("Look", "Complete")] * 2
    assert len(db.rows()) == 6


@pytest.mark.parametrize("framework", ALL)
def test_a_name_that_the_client_chose_excludes_nothing(framework: str, db: Database) -> None:
    """Neither an operation's name nor an alias stands for a field, and one field not for others."""
    exclude = [Exclude(kind="own_write", operation="nested", reason="only the caller's own")]
    service = Service(framework, db, exclude=exclude, privileged=lambda asked: False)
    with capture_audit() as entries:
        service.run("mutation nested { nested: deleteInvoice(id: 1) }")
        service.run("mutation { nested deleteInvoice(id: 2) }")
        audited = [e for e in entries if e["event"] == "Begin"]
        assert [e["data"]["fields"] for e in audited] == [
            ["deleteInvoice"],
            ["nested", "deleteInvoice"],
        ]
        entries.clear()
        service.run("mutation { nested }")

    assert events(entries) == [("Nested", "Record")]


def test_a_read_exclusion_leaves_out_no_mutation(db: Database) -> None:
    """A pattern that fits a mutation's field by accident does not make it a read."""
    everything = [Exclude(kind="public_read", operation="*", reason="all reads")]
    service = Service("strawberry", db, exclude=everything, privileged=lambda asked: False)
    with capture_audit() as entries:
        service.run("mutation { deleteInvoice(id: 1) }")

    assert len(entries) == 2


@pytest.mark.parametrize("framework", ALL)
def test_what_does_not_validate_leaves_no_entry(framework: str, db: Database) -> None:
    """Nothing of it ran: neither of a syntax error, nor of an unknown field or operation."""
    service = Service(framework, db)
    with capture_audit() as entries:
        for document in ("mutation {", "mutation { drop }", "mutation { deleteInvoice }"):
            assert service.run(document)["errors"]

    assert entries == []
    assert db.rows() == []


@pytest.mark.parametrize("framework", ALL)
def test_of_several_operations_the_selected_one_is_recorded(framework: str, db: Database) -> None:
    """A harmless operation that stands first does not hide the one that runs."""
    document = "mutation A { nested }  mutation B { deleteInvoice(id: 3) }"
    with capture_audit() as entries:
        Service(framework, db).run(document, name="B")

    assert events(entries) == [("B", "Begin"), ("B", "Complete")]
    assert entries[0]["data"]["fields"] == ["deleteInvoice"]


@pytest.mark.parametrize("framework", ALL)
def test_secrets_among_variables_are_redacted(framework: str, db: Database) -> None:
    """Redact sees the variables by name; what is written into the document is not recorded."""
    sink = MemorySink()
    handler = AuditHandler(sink)
    structlog.configure(processors=[Redact(), RouteAudit(handler)])
    document = 'mutation In($password: String!) { login(name: "Zacharias", password: $password) }'

    Service(framework, db).run(document, {"password": "hunter2"})
    handler.close()

    assert db.names() == ["login"]
    begin = sink.entries[0]
    assert begin["data"]["variables"].keys() == {"password"}
    assert b"hunter2" not in b"".join(sink.lines)
    assert b"Zacharias" not in b"".join(sink.lines)


@pytest.mark.parametrize("framework", ALL)
def test_entries_of_resolvers_say_that_they_came_by_graphql(framework: str, db: Database) -> None:
    """The type that the HTTP middleware bound is overridden, and is back afterwards."""
    with capture_audit() as entries, audit_context(type="REST", client_ip="192.0.2.1"):
        Service(framework, db).run("mutation { nested }")
        audit_log.info(action="After")

    assert [e["type"] for e in entries] == ["GraphQL"] * 3 + ["REST"]
    assert {e["clientIpAddress"] for e in entries} == {"192.0.2.1"}


@pytest.mark.parametrize("framework", ["strawberry", "strawberry-sync"])
def test_a_result_leaves_only_with_its_outcome_where_that_is_asked(
    framework: str, db: Database
) -> None:
    """The client is told that the outcome is not on record, not that nothing was done."""
    service = Service(framework, db)
    with capture_audit(FailingSink(lambda number: number == 2)):
        answer = service.run("mutation { durable(id: 5) }")

    assert answer["data"] is None
    assert answer["errors"][0]["message"] == "The outcome of the operation could not be recorded."
    assert db.names() == ["durable"]


def test_ariadne_says_that_it_cannot_wait_for_an_outcome(
    db: Database, caplog: pytest.LogCaptureFixture
) -> None:
    """Its hook cannot wait on an event loop, and blocking the loop is worse."""
    with capture_audit() as entries:
        Service("ariadne", db).run("mutation { durable(id: 5) }")

    assert events(entries)[1] == ("durable", "Complete")
    assert "not durable yet" in caplog.text


@pytest.mark.parametrize("framework", ["strawberry-sync", "ariadne-sync"])
def test_threads_do_not_share_operations(framework: str, db: Database) -> None:
    """Each of many threads at work sees its own operation in its resolvers."""
    service = Service(framework, db)
    document = "mutation($id: Int!) { deleteInvoice(id: $id) }"
    with capture_audit() as entries, ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda number: service.run(document, {"id": number}), range(100)))

    check_effects(db, entries, 100)


@pytest.mark.parametrize("framework", ASYNC)
def test_concurrent_mutations_do_not_mix(framework: str, db: Database) -> None:
    """Hundreds on one event loop: each effect lies between its own Begin and outcome."""
    service = Service(framework, db)
    document = "mutation($id: Int!) { a: deleteInvoice(id: $id) }"

    async def all_at_once() -> None:
        await asyncio.gather(*(service.arun(document, {"id": n}) for n in range(300)))

    with capture_audit() as entries:
        asyncio.run(all_at_once())

    check_effects(db, entries, 300)


def check_effects(db: Database, entries: list[dict[str, Any]], count: int) -> None:
    begins = {e["operationId"]: e for e in entries if e["event"] == "Begin"}
    outcomes = {e["operationId"]: e for e in entries if e["event"] == "Complete"}
    rows = db.rows()
    assert len(rows) == len(begins) == len(outcomes) == count
    for _, number, operation, sequence in rows:
        assert begins[operation]["data"]["variables"] == {"id": number}
        assert begins[operation]["sequence"] == sequence < outcomes[operation]["sequence"]


@pytest.mark.parametrize("failing", range(1, 9))
@pytest.mark.parametrize("framework", ASYNC)
def test_whichever_entry_fails_no_effect_is_without_its_begin(
    framework: str, failing: int, db: Database
) -> None:
    """The n-th write of the sink fails: that Begin's mutation does not run, all others do."""
    service = Service(framework, db)
    with capture_audit(FailingSink(lambda number: number == failing)) as entries:
        answers = [
            service.run("mutation($id: Int!) { deleteInvoice(id: $id) }", {"id": n})
            for n in range(5)
        ]

    done = {row[1] for row in db.rows()}
    begun = {e["data"]["variables"]["id"] for e in entries if e["event"] == "Begin"}
    told = {n for n, answer in enumerate(answers) if "errors" not in answer}
    assert done == begun == told
    assert len(done) >= 4


@pytest.mark.parametrize("framework", ASYNC)
def test_parallel_root_fields_share_one_begin(framework: str, db: Database) -> None:
    """Fields of a query are resolved side by side, and belong to one operation."""
    with capture_audit() as entries:
        Service(framework, db, queries=True).run("{ invoices a: secrets b: secrets }")

    assert events(entries) == [("invoices,secrets", "Begin"), ("invoices,secrets", "Complete")]
    assert {row[2] for row in db.rows()} == {entries[0]["operationId"]}
    assert len(db.rows()) == 3


def test_an_async_extension_in_a_sync_execution_runs_no_resolver(db: Database) -> None:
    """The wrong class of the two fails closed."""
    schema = strawberry_schema(AuditExtension())
    with capture_audit():
        result = schema.execute_sync("mutation { deleteInvoice(id: 1) }", None, {"db": db})

    assert result.errors
    assert db.rows() == []


def test_the_class_in_place_of_an_instance_runs_no_resolver(db: Database) -> None:
    """`extensions=[AuditExtension]` is a mistake, and not one that switches auditing off."""
    with pytest.raises(AttributeError):
        asyncio.run(
            strawberry_schema(AuditExtension).execute(
                "mutation { deleteInvoice(id: 1) }", None, {"db": db}
            )
        )

    assert db.rows() == []


def test_an_error_that_is_masked_for_the_client_is_recorded_as_it_was(db: Database) -> None:
    """Extensions behind the audit extension change what the client sees, not what is recorded."""
    from strawberry.extensions import MaskErrors

    schema = strawberry_schema(AuditExtension(), MaskErrors)
    with capture_audit() as entries:
        result = asyncio.run(schema.execute('mutation { fail(text: "why") }', None, {"db": db}))

    assert result.errors is not None
    assert result.errors[0].message == "Unexpected error."
    assert entries[1]["data"]["errors"][0]["message"] == "why"


def test_an_extension_that_fails_behind_it_makes_the_outcome_a_failure(db: Database) -> None:
    """A commit in another extension that fails after the resolvers is seen."""
    from strawberry.extensions import SchemaExtension

    class Commit(SchemaExtension):
        def on_operation(self) -> Any:
            yield
            raise RuntimeError("the commit failed")

    schema = strawberry_schema(AuditExtension(), Commit)
    with capture_audit() as entries:
        asyncio.run(schema.execute("mutation { deleteInvoice(id: 1) }", None, {"db": db}))

    assert events(entries) == [("deleteInvoice", "Begin"), ("deleteInvoice", "Fail")]
    assert entries[1]["data"]["exception"]["type"] == "RuntimeError"


@pytest.mark.parametrize("early", [True, False])
@pytest.mark.parametrize("document", ["subscription { ticks(to: 1) }", "mutation { nested }"])
def test_an_extension_that_stops_an_operation_makes_it_a_failure(
    document: str, early: bool, db: Database
) -> None:
    """Strawberry hands its error to the client as a result, and may leave our hook unfinished."""
    from strawberry.extensions import SchemaExtension

    class Refuse(SchemaExtension):
        def on_execute(self) -> Any:
            if early:
                raise PermissionError("not today")
            yield
            raise PermissionError("not today")

    async def consume() -> list[Any]:
        schema = strawberry_schema(AuditExtension(), Refuse)
        source: Any = await schema.stream(document, None, {"db": db})
        results = [result async for result in source]
        audit_log.info(action="After")
        return results

    with capture_audit() as entries:
        assert "not today" in str(asyncio.run(consume()))
        gc.collect()
        audit_log.info(action="After")

    begin, *_, outcome, inside, after = entries
    assert (begin["event"], outcome["event"]) == ("Begin", "Fail")
    assert "not today" in str(outcome["data"])
    assert "type" not in inside
    assert "type" not in after


def test_a_result_that_the_client_does_not_take_was_carried_out(db: Database) -> None:
    """Its connection broke after the resolver had returned."""

    async def take_and_go() -> None:
        schema = strawberry_schema(AuditExtension())
        source: Any = await schema.stream("mutation { deleteInvoice(id: 1) }", None, {"db": db})
        await anext(source)
        await source.aclose()

    with capture_audit() as entries:
        asyncio.run(take_and_go())

    assert events(entries) == [("deleteInvoice", "Begin"), ("deleteInvoice", "Complete")]


def subscribed(framework: str, db: Database, document: str, take: int = 99) -> list[Any]:
    """Return up to `take` results of a subscription; then the client goes."""

    async def consume() -> list[Any]:
        service = Service(framework, db)
        context = service.context
        if framework == "strawberry":
            source = await service.schema.subscribe(document, None, context)
        else:
            source = graphql.subscribe(
                service.schema, graphql.parse(document), context_value=context
            )
            source = await source if asyncio.iscoroutine(source) else source
        if not hasattr(source, "__aiter__"):
            return [source]
        found = []
        async for result in source:
            found.append(result)
            if len(found) == take:
                break
        await source.aclose()
        return found

    return asyncio.run(consume())


@pytest.mark.parametrize("framework", ASYNC)
def test_a_subscription_is_one_operation_from_its_first_event_to_its_last(
    framework: str, db: Database
) -> None:
    """Its Begin comes before the source is asked, its outcome counts the messages."""
    with capture_audit() as entries:
        results = subscribed(framework, db, "subscription Clock { ticks(to: 3) }")

    assert [result.data for result in results] == [{"ticks": n} for n in range(3)]
    assert events(entries) == [("Clock", "Begin"), ("Clock", "Complete")]
    assert entries[1]["data"]["messages"] == 3
    assert {row[3] for row in db.rows()} == {entries[0]["sequence"]}


@pytest.mark.parametrize("framework", ASYNC)
def test_a_subscription_without_a_begin_has_no_events(framework: str, db: Database) -> None:
    """Its source is never asked."""
    with capture_audit(FailingSink()):
        results = subscribed(framework, db, "subscription { ticks(to: 3) }")

    assert [error.message for error in results[0].errors] == [NOT_CARRIED_OUT]
    assert results[0].errors[0].extensions == {"code": "AUDIT_UNAVAILABLE"}
    assert len(results) == 1
    assert db.rows() == []


@pytest.mark.parametrize("framework", ASYNC)
def test_a_subscription_that_the_client_leaves_is_abandoned(framework: str, db: Database) -> None:
    """With the messages it had by then."""
    with capture_audit() as entries:
        subscribed(framework, db, "subscription { ticks(to: 9) }", take=2)

    assert events(entries) == [("ticks", "Begin"), ("ticks", "Abandon")]
    assert entries[1]["data"]["messages"] == 2


@pytest.mark.parametrize("framework", ASYNC)
def test_a_subscription_whose_source_fails_has_failed(framework: str, db: Database) -> None:
    """An error after the first event."""
    with capture_audit() as entries:
        with contextlib.suppress(ValueError):  # graphql-core lets it through
            subscribed(framework, db, "subscription { fails }")

    assert events(entries) == [("fails", "Begin"), ("fails", "Fail")]
    assert "the source is dry" in str(entries[1]["data"])


@pytest.mark.parametrize("framework", ["ariadne", "ariadne-sync"])
def test_ariadne_without_audited_subscriptions_serves_nothing(
    framework: str, db: Database, caplog: pytest.LogCaptureFixture
) -> None:
    """Its extensions are not told of them, so that would be a hole that nobody sees."""
    service = Service(framework, db)
    service.schema = ariadne_schema()
    with capture_audit() as entries:
        answer = service.run("{ invoices }")
        service.audit.subscriptions(service.audit.subscriptions(service.schema))
        assert "errors" not in service.run("{ invoices }")

    assert answer["errors"][0]["message"] == NOT_CARRIED_OUT
    assert "audit.subscriptions(schema)" in caplog.text
    assert db.names() == ["invoices"]
    assert entries == []


def test_a_subscription_that_nobody_reads_has_an_outcome(db: Database) -> None:
    """Its connection broke between the Begin and the first event."""

    async def never_read() -> None:
        service = Service("ariadne", db)
        document = graphql.parse("subscription { ticks(to: 1) }")
        source: Any = graphql.subscribe(service.schema, document, context_value=service.context)
        source = await source if asyncio.iscoroutine(source) else source
        assert current_operation().receipt is None
        await source.aclose()

    with capture_audit() as entries:
        asyncio.run(never_read())
        gc.collect()

    assert events(entries) == [("ticks", "Begin"), ("ticks", "Abandon")]


def _selected(document: str, variables: Any = None, name: str | None = None) -> Any:
    return _graphql.select(graphql.parse(document), name, variables, None)


@pytest.mark.parametrize(
    ("document", "fields"),
    [
        ("{ a: x a: x b: x }", ["x", "x"]),
        ("{ ...F } fragment F on Query { x ...G } fragment G on Query { y ...F }", ["x", "y"]),
        ("{ ... on Query { x ... { y } } }", ["x", "y"]),
        ("{ x @skip(if: true) y @include(if: false) z @skip(if: false) }", ["z"]),
        ("query($no: Boolean = false) { x @include(if: $no) y @skip(if: $no) }", ["y"]),
        ("query($odd: Boolean) { x @include(if: $odd) }", ["x"]),
        ("{ ...F @skip(if: true) ...F } fragment F on Query { x }", ["x"]),
    ],
)
def test_root_fields_are_those_that_run(document: str, fields: list[str]) -> None:
    """Through fragments, under whatever alias, without what is skipped."""
    assert list(_selected(document).fields) == fields


def test_a_document_of_a_thousand_fields_makes_a_small_entry(db: Database) -> None:
    """Names and numbers are bounded, and their number is told."""
    many = " ".join(f"a{n}: deleteInvoice(id: {n})" for n in range(60))
    name = "N" * 5000
    with capture_audit() as entries:
        service = Service("strawberry", db)
        service.run(f"mutation {name} {{ {many} }}")

    assert entries[0]["action"] == "N" * 100
    assert len(entries[0]["data"]["fields"]) == 50
    assert entries[0]["data"]["fieldCount"] == 60
    action = _selected("{ a b c d e f g }").action
    assert action == "a,b,c,d,e,…"


def test_options_are_checked_when_the_schema_is_made() -> None:
    """Not at the first operation."""
    with pytest.raises(AuditConfigurationError, match="user= must be callable"):
        AuditExtension(user="ada")  # type: ignore[arg-type]


def test_what_is_audited_elsewhere_spares_the_privileged_too() -> None:
    """It is no exclusion of an operation, only of the interceptor that sees less of it."""
    elsewhere = Exclude(kind="elsewhere", path="/graphql", reason="AuditExtension")

    assert elsewhere.leaves_out_privileged
    assert "audited by another interceptor" in str(elsewhere)


@pytest.mark.parametrize("framework", ASYNC)
def test_resolvers_in_threads_know_their_operation(framework: str, db: Database) -> None:
    """A resolver that hands its work to a thread hands the operation on as well."""
    seen: list[Any] = []

    async def hang_in_a_thread(db: Database) -> int:
        def work() -> None:
            seen.append((threading.get_ident(), current_operation().receipt))

        await asyncio.to_thread(work)
        return 1

    with pytest.MonkeyPatch.context() as patch, capture_audit() as entries:
        patch.setattr("graphql_apps.hanging", hang_in_a_thread)
        Service(framework, db).run("mutation { hang }")

    ((thread, receipt),) = seen
    assert thread != threading.get_ident()
    assert receipt.sequence == entries[0]["sequence"]

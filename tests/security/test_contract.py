"""Requests made from the OpenAPI document, valid and not: no 5xx, and no answer that the document
does not describe.

For each operation there are requests that succeed, so that each success is seen as it is described;
generated ones are about random things, or about things that the service knows. A valid one may be
refused for what JSON Schema cannot say (bytes that are no video, a video that nobody has), so
`positive_data_acceptance` alone is not checked. Parameters of the query that the document does not
name are not generated: HTTP has servers ignore them.
"""

from collections.abc import Iterator
from fnmatch import fnmatch
from typing import Any

import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from hypothesis.errors import Unsatisfiable
from schemathesis import Case, GenerationMode
from schemathesis.checks import CHECKS, load_all_checks
from schemathesis.config import SchemathesisConfig
from schemathesis.core.failures import FailureGroup
from schemathesis.specs.openapi.schemas import OpenApiSchema

from tests.security.scale import SCALE
from tests.security.service import OPERATOR, PATIENCE_S, Service, bearer
from tests.security.sound_requests import JSON, Known
from tests.security.tally import Tally

ROW = "requests generated from the OpenAPI document"
SOUND = "sound requests for all that the OpenAPI document describes"
CONFIG = {"generation": {"allow-extra-parameters": False, "with-security-parameters": False}}
Success = tuple[str, str, str]  # operation, status, media type or ""


@pytest.fixture(scope="module")
def document(service: Service) -> Iterator["Document"]:
    with requests.Session() as session:
        yield Document(service, session)


def test_each_success_is_as_the_document_describes_it(document: "Document", tally: Tally) -> None:
    wanted, seen = set[Success](), set[Success]()
    for operation in document.operations():
        wanted |= set(successes(operation))
        for case in document.sound_cases(operation):
            response = document.send(case, SOUND, tally)
            kind = response.headers.get("content-type", [""])[0].partition(";")[0]
            found = (operation.label, str(response.status_code), kind)
            seen |= {success for success in wanted if all(map(fnmatch, found, success))}
    assert wanted - seen == set(), "not seen once"
    tally.check(SOUND)


@pytest.mark.timeout(SCALE.timeout_s)
@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE])
def test_answers_are_those_that_the_document_describes(
    mode: GenerationMode, document: "Document", service: Service, tally: Tally
) -> None:
    for operation in document.operations():
        document.try_out(operation, mode, tally)
    assert not service.has_failed_inside()
    tally.check(ROW)


def successes(operation: Any) -> Iterator[Success]:
    """What an operation may succeed with, as the document has it."""
    for status, response in operation.definition.raw["responses"].items():
        if status.startswith("2"):
            for kind in response.get("content", {"": None}):
                yield operation.label, status, kind


class Document:
    """A running service's own, and what a key with all scopes may do by it."""

    def __init__(self, service: Service, session: requests.Session) -> None:
        load_all_checks()
        self._session = session
        self._headers = bearer(OPERATOR)
        self._known = Known(service.operator)
        self._schema: OpenApiSchema = schemathesis.openapi.from_url(
            f"{service.url}/openapi.json",
            headers=self._headers,
            config=SchemathesisConfig.from_dict(CONFIG),
        )

    def operations(self) -> Iterator[Any]:
        for operation in self._schema.get_all_operations():
            yield operation.ok()

    def sound_cases(self, operation: Any) -> Iterator[Case]:
        required = [parameter.name for parameter in operation.query if parameter.is_required]
        for sound in self._known.requests(operation.label, operation.path, required):
            parts = {name: part for name, part in vars(sound).items() if part is not None}
            yield operation.Case(**parts)

    def send(self, case: Case, row: str, tally: Tally, *without: str) -> Any:
        """Sends it and judges the answer by the document.

        Args:
            without: checks.
        """
        excluded = CHECKS.get_by_names(["positive_data_acceptance", *without])
        response = case.call(session=self._session, headers=self._headers, timeout=PATIENCE_S)
        try:
            case.validate_response(response, excluded_checks=excluded)
        except FailureGroup as failures:
            found = " / ".join(str(failure) for failure in failures.exceptions)
            tally.count(row, f"{case.operation.label}: {found}")
        else:
            tally.count(row)
        return response

    def try_out(self, operation: Any, mode: GenerationMode, tally: Tally) -> None:
        """Sends what the document makes of an operation, half of it about known things."""
        # A body with a file cannot be checked again once a known one has been put in.
        without = ["negative_data_rejection"] if mode is GenerationMode.POSITIVE else []

        @settings(
            max_examples=SCALE.num_examples,
            derandomize=True,
            database=None,
            deadline=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(case=operation.as_strategy(generation_mode=mode), is_known=st.booleans())
        def run(case: Case, is_known: bool) -> None:
            if is_known:
                self._put_in_known(case, mode)
            self.send(case, ROW, tally, *without)

        try:
            run()
        except Unsatisfiable:  # it takes nothing that could be wrong
            assert mode is GenerationMode.NEGATIVE

    def _put_in_known(self, case: Case, mode: GenerationMode) -> None:
        ids = self._known.ids(is_deleted=case.method == "DELETE")
        for part in (case.path_parameters, case.query):
            part.update({name: value for name, value in ids.items() if name in part})
        is_whole = case.media_type == JSON or mode is GenerationMode.POSITIVE
        if isinstance(case.body, dict) and case.media_type is not None and is_whole:
            case.body = self._known.body(case.operation.label, case.media_type, case.body)

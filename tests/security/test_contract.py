"""Requests generated from the OpenAPI document, valid and not: no 5xx, and no answer that the
document does not describe.

A valid request may be refused for what JSON Schema cannot say (bytes that are no video, a video
that nobody has), so `positive_data_acceptance` alone is not checked. Parameters of the query that
the document does not name are not generated: HTTP has servers ignore them.
"""

from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.errors import Unsatisfiable
from schemathesis import GenerationMode
from schemathesis.checks import CHECKS, load_all_checks
from schemathesis.config import SchemathesisConfig
from schemathesis.core.failures import FailureGroup
from schemathesis.specs.openapi.schemas import OpenApiSchema

from tests.security.service import Service, bearer, upload
from tests.security.tally import Tally

NUM_EXAMPLES = 12  # of each operation and mode
ROW = "requests generated from the OpenAPI document"
CONFIG = {"generation": {"allow-extra-parameters": False, "with-security-parameters": False}}


@pytest.mark.timeout(900)
@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE])
def test_answers_are_those_that_the_document_describes(
    mode: GenerationMode, service: Service, tally: Tally
) -> None:
    upload(service.alice)
    document = Document(service)
    for operation in document.schema.get_all_operations():
        document.try_out(operation.ok(), mode, tally)
    assert not service.has_failed_inside()
    tally.check(ROW)


class Document:
    """A running service's own."""

    def __init__(self, service: Service) -> None:
        load_all_checks()
        self._excluded = CHECKS.get_by_names(["positive_data_acceptance"])
        self._headers = bearer("alice")
        self.schema: OpenApiSchema = schemathesis.openapi.from_url(
            f"{service.url}/openapi.json",
            headers=self._headers,
            config=SchemathesisConfig.from_dict(CONFIG),
        )

    def try_out(self, operation: Any, mode: GenerationMode, tally: Tally) -> None:
        """Sends what the document makes of an operation and judges the answers by it."""

        @settings(
            max_examples=NUM_EXAMPLES,
            derandomize=True,
            database=None,
            deadline=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(case=operation.as_strategy(generation_mode=mode))
        def run(case: Any) -> None:
            response = case.call(headers=self._headers, timeout=60)
            try:
                case.validate_response(response, excluded_checks=self._excluded)
            except FailureGroup as failures:
                found = " / ".join(str(failure) for failure in failures.exceptions)
                tally.count(ROW, f"{operation.label}: {found}")
            else:
                tally.count(ROW)

        try:
            run()
        except Unsatisfiable:  # it takes nothing that could be wrong
            assert mode is GenerationMode.NEGATIVE

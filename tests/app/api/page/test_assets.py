"""Headers of what browsers load, and what of it has a path."""

import httpx
import pytest
from starlette.applications import Starlette
from starlette.routing import Mount

from app.api.page.assets import DOCS_CSP, PAGE_CSP, docs_assets, html_headers, page_assets


@pytest.fixture
def client() -> httpx.AsyncClient:
    app = Starlette(routes=[Mount("/page", page_assets()), Mount("/docs", docs_assets())])
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test")


@pytest.mark.parametrize(
    ("path", "kind"), [("/page/js/main.js", "javascript"), ("/docs/swagger-ui.css", "css")]
)
async def test_a_file_is_asked_for_each_time_and_has_one_type(
    client: httpx.AsyncClient, path: str, kind: str
) -> None:
    response = await client.get(path)
    assert response.status_code == 200 and kind in response.headers["content-type"]
    assert response.headers["cache-control"] == "no-cache"
    assert response.headers["x-content-type-options"] == "nosniff"
    assert response.headers["cross-origin-resource-policy"] == "same-origin"
    again = await client.get(path, headers={"If-None-Match": response.headers["etag"]})
    assert again.status_code == 304 and not again.content
    assert again.headers["x-content-type-options"] == "nosniff"


@pytest.mark.parametrize(
    "path",
    ["/page/index.html", "/page/docs.html", "/page/none.js", "/page/../assets.py", "/page/js"],
)
async def test_pages_and_what_lies_outside_have_no_path_here(
    client: httpx.AsyncClient, path: str
) -> None:
    assert (await client.get(path)).status_code == 404


def test_the_page_runs_no_script_but_its_own() -> None:
    directives = dict(part.strip().partition(" ")[::2] for part in PAGE_CSP.split(";"))
    assert directives["default-src"] == "'none'"
    assert directives["script-src"] == directives["style-src"] == "'self'"
    assert directives["frame-ancestors"] == "'none'"
    assert directives["require-trusted-types-for"] == "'script'"
    headers = html_headers(PAGE_CSP)
    assert headers["Content-Security-Policy"] == PAGE_CSP
    assert headers["Referrer-Policy"] == "no-referrer"


def test_the_documents_page_may_style_but_run_nothing_more() -> None:
    directives = dict(part.strip().partition(" ")[::2] for part in DOCS_CSP.split(";"))
    assert directives["script-src"] == "'self'"
    assert "'unsafe-inline'" in directives["style-src"]

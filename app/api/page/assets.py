"""Files that browsers load from this service: the page's own, and Swagger UI's.

They contain no one's data, so they need no key. Browsers check every time whether a file has
changed, so a new release shows at once and file names need not change.
"""

from pathlib import Path

from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.staticfiles import StaticFiles
from starlette.types import Scope

_HERE = Path(__file__).parent / "static"
INDEX = _HERE / "index.html"
DOCS = _HERE / "docs.html"

_CSP = (
    "default-src 'none'; script-src 'self'; {styles}; {images}; media-src 'self' blob:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
PAGE_CSP = (
    _CSP.format(styles="style-src 'self'", images="img-src 'self' blob:")
    + "; require-trusted-types-for 'script'; trusted-types 'none'"
)
# Swagger UI writes style attributes, draws its icons from data: URLs, and sets innerHTML.
DOCS_CSP = _CSP.format(styles="style-src 'self' 'unsafe-inline'", images="img-src 'self' data:")

_COMMON_HEADERS = {
    "Cache-Control": "no-cache",
    "Cross-Origin-Resource-Policy": "same-origin",
    "X-Content-Type-Options": "nosniff",
}


def html_headers(csp: str) -> dict[str, str]:
    return {
        **_COMMON_HEADERS,
        "Content-Security-Policy": csp,
        "Referrer-Policy": "no-referrer",
    }


class Assets(StaticFiles):
    """Files of one folder, but for pages: these have a policy and a path of their own."""

    async def get_response(self, path: str, scope: Scope) -> Response:
        if path.endswith(".html"):
            raise HTTPException(status_code=404)
        response = await super().get_response(path, scope)
        response.headers.update(_COMMON_HEADERS)
        return response


def page_assets() -> Assets:
    return Assets(directory=_HERE)


def docs_assets() -> Assets:
    return Assets(packages=[("fastapi_swagger", "resources")])

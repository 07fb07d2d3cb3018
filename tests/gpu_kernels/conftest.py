"""For runs that do not read `tests/conftest.py`: see `tests/gpu/pytest.ini`."""

from importlib.util import find_spec

import tests.conftest  # noqa: F401  chooses the interpreter where there is no GPU

collect_ignore = [] if find_spec("hypothesis") else ["test_selection_properties.py"]

"""What can be tested where: `make test` installs Triton, a bare GPU image lacks hypothesis."""

from importlib.util import find_spec

import tests.conftest  # noqa: F401  chooses the interpreter where there is no GPU

collect_ignore_glob = [] if find_spec("triton") else ["test_*.py"]
collect_ignore = [] if find_spec("hypothesis") else ["test_selection.py"]

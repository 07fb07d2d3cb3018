"""Where there is no Triton there are no kernels to test: `make test` installs it, demo does not."""

from importlib.util import find_spec

collect_ignore_glob = [] if find_spec("triton") else ["test_*.py"]

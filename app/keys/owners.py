"""Whom jobs and videos belong to: an opaque id, the same for as long as its key lives."""

import re

ANONYMOUS = "anonymous"  # everybody, where there are no keys

OWNER_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")

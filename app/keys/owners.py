"""Whom jobs and videos belong to: an opaque id, the same for as long as its key lives."""

import re

ANONYMOUS = "anonymous"  # everybody, where there are no keys

OWNER_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")


def cache_salt(owner: str, *, are_caches_shared: bool) -> str:
    """What keeps an owner's frames and features from the others, whom a hit would tell that
    somebody has asked about the same video."""
    return "" if owner == ANONYMOUS or are_caches_shared else owner

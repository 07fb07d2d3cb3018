"""Keys of an API as tests use them: of two clients, named in the settings, and the header of any.

A key that a command stores: the fixture `add_key`.
"""


def bearer(secret: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {secret}"}


SECRETS = {name: f"key-of-{name}-" + "x" * 32 for name in "ab"}
A, B = (bearer(secret) for secret in SECRETS.values())
KEYS = ",".join(f"{name}:{secret}" for name, secret in SECRETS.items())

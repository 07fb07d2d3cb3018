"""How connections end: the client leaves, the body lingers, the server drains."""

"""The bundled demo model and clip: small enough to ship, genuine enough for every test."""

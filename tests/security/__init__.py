"""An attacker's review as tests: bounded, seeded, in every run of the suite.

Each test counts what it tried and what got through. `python -m tests.security` runs them and prints
the table of SECURITY.md.
"""

"""Which visual tokens a language model sees, and what that saves."""

"""Which visual tokens a language model gets to see, and what that saves."""

"""A federation that is small enough for a test and real enough to learn something."""

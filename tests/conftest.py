"""Settings of the whole suite."""

from hypothesis import settings

# The same examples on every run: a change that passed here passes everywhere.
settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.load_profile("repeatable")

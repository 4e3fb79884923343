"""Prefect flows over `mild` and `dataset_tools`, and the `mild` command line."""

import os

# Prefect and its libraries report usage to their makers unless told not to, and print stack traces at exit
# where they cannot reach them. Whoever wants that can set the variables.
os.environ.setdefault("PREFECT_SERVER_ANALYTICS_ENABLED", "false")
os.environ.setdefault("DO_NOT_TRACK", "1")

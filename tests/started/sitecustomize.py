"""Imported first in every Python process that tests start, many of which import torch or Prefect and do little more.

Python would look for garbage among all that they import, again and again, for a fifth of their time.
"""

import gc

gc.set_threshold(100_000, 10, 10)

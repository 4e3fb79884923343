"""How good a result is: one file a metric, its settings beside it.

A metric that cannot be computed gives `mild.metrics.metric.NotComputed` with the reason, and never a number instead.
Nothing heavier than pydantic is imported before a metric is computed.
"""

"""Replays workloads through the real schedulers of serving engines, under a virtual clock, without model or worker.

What `mope replay` runs. What a policy does to whom shows in seconds on a CPU, exactly and repeatably: who waits how
long, who is served how much. What a GPU would do is a formula here (`mope.fairness.engine_costs`), not a measurement.
"""

"""Estimates of a run's cost in advance: parameters, steps, memory, GPU hours."""

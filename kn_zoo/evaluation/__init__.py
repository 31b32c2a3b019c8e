"""Predictions, their verification against stored ones, and benchmarks."""

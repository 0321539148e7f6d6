"""Benchmarks of EleutherAI's lm-evaluation-harness, an extra that only `likelihoods.py` does not import."""

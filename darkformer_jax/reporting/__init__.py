"""Turns the workdirs of runs into tables, plots and a page; `python -m darkformer_jax.report` is the verb."""

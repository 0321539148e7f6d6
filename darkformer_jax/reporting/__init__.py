"""From the workdirs of runs to tables, plots and a page; `python -m darkformer_jax.report` is the verb."""

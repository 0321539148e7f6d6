"""Every field of an experiment in one place: its default, its range, and what earlier workdirs meant."""

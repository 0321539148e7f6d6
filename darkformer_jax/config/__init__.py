"""Every field of an experiment in one place: its default, its range, and its meaning in earlier workdirs."""

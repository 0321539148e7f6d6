"""Compiles programs for machines that are not there: memory, collectives and time bounds before money is spent."""

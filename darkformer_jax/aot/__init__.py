"""Programs compiled for machines that are not there: memory, collectives and time bounds before any money is spent."""

"""Fitting a mechanism to what exact attention does: moments, geometries, attention transfer, a whole model."""

REPORT_FILE = "calibration.json"  # of a workdir that calibrate wrote

"""Fitting a mechanism to what exact attention does: moments, geometries, attention transfer."""

REPORT_FILE = "calibration.json"  # of a workdir that calibrate wrote

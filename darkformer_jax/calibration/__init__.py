"""Fits mechanisms to exact attention: moments, geometries, attention transfer, a whole model."""

CALIBRATION_FILE = "calibration.json"  # in a workdir that calibrate wrote
GEOMETRIES = ("identity", "whitening", "balanced")  # what M may start from

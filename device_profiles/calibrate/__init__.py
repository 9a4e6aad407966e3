"""Calibration: measures this board and writes its profile."""

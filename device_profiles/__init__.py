"""Boards: shipped profiles, comparison and calibration."""

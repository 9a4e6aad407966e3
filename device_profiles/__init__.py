"""What a board is: profiles, later also calibration and images."""

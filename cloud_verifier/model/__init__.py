"""A target at work: its forwards, its choices, its memory."""

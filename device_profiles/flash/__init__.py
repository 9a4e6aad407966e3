"""Writes images to cards: finds the card, refuses disks that are none, writes, and reads everything back."""

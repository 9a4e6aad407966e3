"""Writes images to cards: finds the card, refuses disks that are not cards, writes, and reads everything back."""

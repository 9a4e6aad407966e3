"""Sessions and rounds: who may ask, in which order, and what becomes of it."""

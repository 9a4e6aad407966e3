"""A small memory of verified text that helps the frozen draft guess: it changes guesses, and never the text."""

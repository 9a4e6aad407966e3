"""How much to draft, and how much to leave to the cloud, round by round."""

"""Training of the learned planner: simulated rounds as a Gymnasium environment, and the policy."""

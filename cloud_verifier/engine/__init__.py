"""Sessions and rounds: authentication, admission control, scheduling, rollout of target versions, and metrics."""

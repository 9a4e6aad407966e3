"""Several replicas of a verifier at one address, run by Ray Serve."""

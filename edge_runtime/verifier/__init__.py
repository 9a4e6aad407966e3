"""The client side of the verifier: endpoints, sessions, retries and the diagnosis of link faults."""

"""HTTP: routes, servers, and replicas behind one door."""

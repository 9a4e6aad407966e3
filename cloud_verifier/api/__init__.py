"""The HTTP API: routes, admin API, OpenAPI document and server."""

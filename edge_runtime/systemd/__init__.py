"""Board and verifier as services of systemd: what they tell it, their units, and putting those in place.

The verifier shares this, as it does `edge_runtime.common.http_server`.
"""

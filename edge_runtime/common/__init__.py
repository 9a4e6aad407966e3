"""Infrastructure that the board and the verifier share: HTTP server, logging, files, network checks, sd_notify."""

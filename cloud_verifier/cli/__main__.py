"""Run with `python -m cloud_verifier.cli`."""

from cloud_verifier.cli.main import main

raise SystemExit(main())

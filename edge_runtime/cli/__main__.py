"""Run with `python -m edge_runtime.cli`."""

from edge_runtime.cli.main import main

raise SystemExit(main())

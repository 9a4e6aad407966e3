"""Run with `python -m export.cli`."""

from export.cli.main import main

raise SystemExit(main())

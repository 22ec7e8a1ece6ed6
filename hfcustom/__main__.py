"""`python -m hfcustom` is the command `hfcustom`."""

from hfcustom.cli import main

raise SystemExit(main())

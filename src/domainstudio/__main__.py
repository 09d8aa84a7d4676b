"""`python -m domainstudio`, which launchers start: the command line."""

import sys

from domainstudio.app.cli import main

sys.exit(main())

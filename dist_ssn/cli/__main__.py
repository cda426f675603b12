"""`python -m dist_ssn.cli`, for launchers that start a module."""

import sys

from dist_ssn.cli.entry import main

sys.exit(main())

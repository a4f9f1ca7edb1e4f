"""`python -m remora`."""

import sys

from remora.cli import main

sys.exit(main())

"""`python -m rlhf_report.quarto report.qmd`."""

import sys

from rlhf_report.quarto.render import main

sys.exit(main())

"""`python -m rlhf_report verify FILE_OR_FOLDER...` checks submissions."""

import sys

from rlhf_report import verify

if sys.argv[1:2] != ["verify"]:
    sys.exit("error: python -m rlhf_report verify FILE_OR_FOLDER...")
sys.exit(verify.main(sys.argv[2:]))

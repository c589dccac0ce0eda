"""The one error that tells a user what to do."""


class UserError(Exception):
    """Bad input. The message names the file, the field and the remedy."""

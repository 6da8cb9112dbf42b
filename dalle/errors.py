"""The error for invalid input."""


class UserError(ValueError):
    """Invalid input. The message is one sentence with the offending value and the fix.

    The command line prints it as one line and exits with code 2. Any other exception is a bug and shows a traceback.
    """

"""Errors that are the user's to fix."""


class UserError(ValueError):
    """A mistake in the input: one sentence with the offending value and the fix.

    The command line prints it as one line and exits with code 2; anything else that is raised is a bug and shows a
    traceback.
    """

"""The one kind of error that is the user's to mend."""


class UserError(ValueError):
    """A mistake that the person at the keyboard can mend.

    The message is one line: it names the key or the file, and the remedy. The command line prints it without a
    traceback and exits with code 2. Anything else that is raised is our own fault and keeps its traceback.
    """

"""The base of every error that is raised for the user rather than for the programmer."""


class QatError(ValueError):
    """A mistake in what was asked for; the message is one line that says what to do."""


class ModelError(QatError):
    """A Keras model, or a file of one, that cannot be taken."""


class UserError(QatError):
    """A flag, a folder or a combination of them that cannot be."""

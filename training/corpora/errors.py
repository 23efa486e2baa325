"""What goes wrong with training data."""


class CorpusError(Exception):
    """Something the user can mend, said in one line that names the package or the file it is about."""

"""What can go wrong, said in one sentence each."""


class LorakitError(Exception):
    """A refusal or a failure that one plain sentence explains."""


class FileFormatError(LorakitError):
    """A file is not what it should be."""


class AdapterError(LorakitError):
    """A module's tensors do not make an adapter that lorakit can use here."""


class UnmatchedError(LorakitError):
    """Something has no place in the output."""


class SpecError(LorakitError):
    """An argument cannot be read: wrong usage."""


class NumericsError(LorakitError):
    """A value is not finite or does not fit its stored dtype."""


class OutputError(LorakitError):
    """The output cannot or must not be written."""

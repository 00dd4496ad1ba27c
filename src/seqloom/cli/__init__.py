"""The command line; `seqloom.cli.main:main` is its entrance."""

__all__: list[str] = []

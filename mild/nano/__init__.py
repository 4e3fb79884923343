"""The very small base that comes with the package: what it is made of, and its training from nothing."""

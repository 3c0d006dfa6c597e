"""The store of examples grouped by class, how it is made from a user's files, and the embedded Omniglot."""

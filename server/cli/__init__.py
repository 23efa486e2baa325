"""The command line: `hnet` and its subcommands, one a file. Knows options and terminals; no tensors."""

"""The command `servegrid`: `main` assembles it, each other module adds subcommands."""

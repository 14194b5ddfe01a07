"""One file per target: its settings (CONFIG) and its verbs (Target). The folder is the registry."""

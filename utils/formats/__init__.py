"""Files of other programs: adapters and whole models, recognised, read, written and converted."""

"""The engine room: everything that is the same for every model family.  It never imports ``models``."""

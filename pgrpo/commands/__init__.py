"""What ``pgrpo NAME`` runs, one file a command. ``pgrpo.cli`` imports each only when it is called."""

"""Model folders: what they may hold, how they are opened and written."""

"""What HISTEX.py stands on: the section, prediction, uncertainty, and what is kept on disk."""

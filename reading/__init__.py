"""Checked reads: each returns what it promises, or says what is wrong with which file."""

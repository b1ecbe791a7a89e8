"""What reports say, as language: statements of presence and absence, and their opposites. One file of rules per language."""

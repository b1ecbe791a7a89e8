"""`mg3d <command>`: one module per command; wiring and printing only."""

"""The scaling law: solver, intervals, tables in and out, plots."""

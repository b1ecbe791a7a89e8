"""Procedural chest CT patients with reports and labels, for tests, the quickstart and checks of exports."""

"""`mg3d report`: one HTML page that says how a run went."""

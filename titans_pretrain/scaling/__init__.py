"""Scaling laws: from one YAML to a grid of runs, the points they leave, the law through the points and what it predicts."""

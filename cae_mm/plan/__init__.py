"""What a run is going to take, before it starts: ``python tools/plan.py CONFIG``."""

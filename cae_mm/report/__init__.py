"""One HTML page that shows runs: ``python -m cae_mm.report WORK_DIR ...``."""

"""What is wrong with the installation or with a config: ``python -m cae_mm.doctor``."""

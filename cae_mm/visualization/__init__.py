"""Pictures that show what an encoder makes of images; ``tools/picture.py`` draws them from files.

Each module gives numbers first (weights, scores, neighbours), then pictures: RGB tensors
(3, H, W) in [0, 1] on the host. ``sheet`` puts pictures onto one PNG.
"""

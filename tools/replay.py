"""Repeat a training step whose loss or gradients were not finite, and say where it breaks.

python tools/replay.py WORK_DIR/faults/iter_46_rank_0.json
"""

import argparse

from cae_mm.replay import replay


def main() -> None:
    """Repeat it and print what was found."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('fault', help='file that the run wrote into `faults` in its work directory')
    print(replay(parser.parse_args().fault))


if __name__ == '__main__':
    main()

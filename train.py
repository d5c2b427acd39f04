"""Make a model.   python train.py --help"""

from dd.cli.train import DOOR
from dd.config import main

if __name__ == "__main__":
    main(DOOR)

"""Make or change synthetic data.   python generate.py --help"""

from dd.cli.generate import DOOR
from dd.config import main

if __name__ == "__main__":
    main(DOOR)

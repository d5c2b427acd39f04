"""Numbers and pages about data and models; neither is changed.   python evaluate.py --help"""

from dd.cli.evaluate import DOOR
from dd.config import main

if __name__ == "__main__":
    main(DOOR)

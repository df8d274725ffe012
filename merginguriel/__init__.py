__version__ = "0.0.1"

from merginguriel import front # The verbs: nbs/7_command/40_front.ipynb

front.open_door(__name__)

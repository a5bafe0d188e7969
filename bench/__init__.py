"""Measurements of speed and memory, in units that travel between machines."""

import os

# As the command line does: threads that wait by spinning would measure who else is on the machine. Read by torch's import.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

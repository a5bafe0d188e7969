"""Two threads at most for every test process: the suite runs in parallel on small machines."""

import torch

torch.set_num_threads(1)

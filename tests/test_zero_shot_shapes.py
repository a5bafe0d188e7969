"""Zero-shot from end to end on `shapes`: two pairs of a colour and a form that training never sees are named by their vectors."""

import json
from pathlib import Path

import pytest
import torch

from maskfirst.cli import main

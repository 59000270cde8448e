"""train.py on a stand-in for a GPU: what the launcher of several processes starts. gloo takes the part of nccl."""

import os
import sys

import pytest

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path[:0] = [os.path.dirname(os.path.dirname(HERE)), os.path.dirname(HERE)]
os.environ["PADDLE_DISTRI_BACKEND"] = "gloo"

from stand_in_gpu import StandInGpu

import train
from runtime import process

if __name__ == "__main__":
    StandInGpu(pytest.MonkeyPatch())
    process.run_script(train.main)

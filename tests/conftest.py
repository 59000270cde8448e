"""The checkout's root on the import path, and Paddle set up as the scripts do, once per test process."""

import os
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)

import utility  # noqa: E402

utility.start_paddle()

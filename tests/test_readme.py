"""README.md and README_CN.md: every command in them runs, or says where it does; both say the same."""

import json
import os
import re
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import openai
import pytest
import serve
from clients_of_readme import audio_part, wav_base64  # noqa: F401
